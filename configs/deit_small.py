"""DeiT-S on ImageNet-1k, 300 epochs: the baseline of halvit_tiny.

python -m halvit_jax.main --config=configs/deit_small.py --workdir=runs/deit_small

`configs/deit_small.py:distilled` with --config.teacher.init_from=SOURCE learns from a RegNetY-16GF.
Hardware: a TPU v5e-8, v4-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1 (non-EMA weights): 79.9; distilled: 81.2. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose

VARIANTS = (("", "distilled"),)


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of DeiT-S."""
    (recipe,) = choose(variant, *VARIANTS)
    return (imagenet.deit_distilled if recipe else imagenet.deit)("deit_small")
