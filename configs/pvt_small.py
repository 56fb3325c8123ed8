"""PVT-Small on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/pvt_small.py --workdir=runs/pvt_small

Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: 79.8. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(epochs: str = "300") -> ConfigDict:
    """The ImageNet run of PVT-Small."""
    return imagenet.pvt("pvt_small", epochs=int(epochs))
