"""PVT-Medium on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/pvt_medium.py --workdir=runs/pvt_medium

Hardware: a TPU v5e-16, v4-16 or 8 GPUs of 40 GB and more. Expected time: not measured.
Published top-1: 81.2. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(epochs: str = "300") -> ConfigDict:
    """The ImageNet run of PVT-Medium."""
    return imagenet.pvt("pvt_medium", epochs=int(epochs))
