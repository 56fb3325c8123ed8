"""DeiT-B on ImageNet-1k, 300 epochs: the baseline of halvit_small.

python -m halvit_jax.main --config=configs/deit_base.py --workdir=runs/deit_base

Hardware: a TPU v5e-16, v4-16 or 8 GPUs of 40 GB and more. Expected time: not measured.
Published top-1: 81.8 (non-EMA weights). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of DeiT-B."""
    choose(variant)
    return imagenet.deit("deit_base")
