"""HaLViT on the 1,797 digits that ship inside scikit-learn: the two-minute run.

python -m halvit_jax.main --config=configs/halvit_digits.py --workdir=runs/halvit_digits
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits
from halvit_jax.recipes.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """The digits run of the tied model."""
    choose(variant)
    return digits.vit("halvit_tiny")
