"""The plain twin of halvit_digits: the same shape and recipe with untied kernels.

python -m halvit_jax.main --config=configs/vit_digits.py --workdir=runs/vit_digits
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits


def get_config() -> ConfigDict:
    """The digits run of the untied model."""
    return digits.vit("deit_small")
