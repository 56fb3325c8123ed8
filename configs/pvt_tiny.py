"""PVT-Tiny on ImageNet-1k, 300 epochs: the plain twin of pvt_tiny_hc.

python -m halvit_jax.main --config=configs/pvt_tiny.py --workdir=runs/pvt_tiny

Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: 75.1. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(epochs: str = "300") -> ConfigDict:
    """The ImageNet run of PVT-Tiny."""
    return imagenet.pvt("pvt_tiny", epochs=int(epochs))
