"""PVTv2-B2-Li on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/pvt_v2_b2_li.py --workdir=runs/pvt_v2_b2_li

Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: 82.1. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(epochs: str = "300") -> ConfigDict:
    """The ImageNet run of PVTv2-B2-Li."""
    return imagenet.pvt("pvt_v2_b2_li", epochs=int(epochs))
