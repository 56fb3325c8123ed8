"""DeiT-Ti on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/deit_tiny.py --workdir=runs/deit_tiny

Hardware: a TPU v5e-4 or 4 GPUs of 16 GB and more. Expected time: not measured.
Published top-1: 72.2 (non-EMA weights). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of DeiT-Ti."""
    choose(variant)
    return imagenet.deit("deit_tiny")
