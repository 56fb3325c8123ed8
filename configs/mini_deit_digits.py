"""A Mini-DeiT on the embedded digits: vit_digits with two layers for each set of matrices.

python -m halvit_jax.main --config=configs/mini_deit_digits.py --workdir=runs/mini_deit_digits
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits


def get_config() -> ConfigDict:
    """The digits run of the shared model."""
    return digits.vit("mini_deit_tiny")
