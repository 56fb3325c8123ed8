"""DeiT-S on ImageNet-1k, 300 epochs: the baseline of halvit_tiny.

python -m halvit_jax.main --config=configs/deit_small.py --workdir=runs/deit_small

Hardware: a TPU v5e-8, v4-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: 79.9 (non-EMA weights). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of DeiT-S."""
    choose(variant)
    return imagenet.deit("deit_small")
