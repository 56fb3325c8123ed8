"""DeiT-B on ImageNet-1k, 300 epochs: the baseline of halvit_small.

python -m halvit_jax.main --config=configs/deit_base.py --workdir=runs/deit_base

`configs/deit_base.py:distilled` with --config.teacher.init_from=SOURCE learns from a RegNetY-16GF.
Hardware: a TPU v5e-16, v4-16 or 8 GPUs of 40 GB and more. Expected time: not measured.
Published top-1 (non-EMA weights): 81.8; distilled: 83.4. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose

VARIANTS = (("", "distilled"),)


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of DeiT-B."""
    (recipe,) = choose(variant, *VARIANTS)
    return (imagenet.deit_distilled if recipe else imagenet.deit)("deit_base")
