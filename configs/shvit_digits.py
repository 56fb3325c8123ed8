"""A small SHViT on the 1,797 digits that ship inside scikit-learn.

python -m halvit_jax.main --config=configs/shvit_digits.py --workdir=runs/shvit_digits
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits


def get_config() -> ConfigDict:
    """The digits run of the single-head model."""
    return digits.shvit()
