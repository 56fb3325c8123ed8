"""HaLViT on the 1,797 digits that ship inside scikit-learn: the two-minute run.

python -m halvit_jax.main --config=configs/halvit_digits.py --workdir=runs/halvit_digits
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits


def get_config() -> ConfigDict:
    """The digits run of the tied model."""
    return digits.vit("halvit_tiny")
