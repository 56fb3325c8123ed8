"""The baseline of halvit_digits: the same shape and recipe with untied kernels.

python -m halvit_jax.main --config=configs/vit_digits.py --workdir=runs/vit_digits
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits
from halvit_jax.recipes.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """The digits run of the untied model."""
    choose(variant)
    return digits.vit("deit_small")
