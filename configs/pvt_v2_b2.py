"""PVTv2-B2 on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/pvt_v2_b2.py --workdir=runs/pvt_v2_b2

Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: 82.0. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(epochs: str = "300") -> ConfigDict:
    """The ImageNet run of PVTv2-B2."""
    return imagenet.pvt("pvt_v2_b2", epochs=int(epochs))
