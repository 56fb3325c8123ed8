"""DeiT-Ti on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/deit_tiny.py --workdir=runs/deit_tiny

`configs/deit_tiny.py:distilled` with --config.teacher.init_from=SOURCE learns from a RegNetY-16GF.
Hardware: a TPU v5e-4 or 4 GPUs of 16 GB and more. Expected time: not measured.
Published top-1 (non-EMA weights): 72.2; distilled: 74.5. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose

VARIANTS = (("", "distilled"),)


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of DeiT-Ti."""
    (recipe,) = choose(variant, *VARIANTS)
    return (imagenet.deit_distilled if recipe else imagenet.deit)("deit_tiny")
