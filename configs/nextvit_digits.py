"""A small Next-ViT on the 1,797 digits that ship inside scikit-learn.

python -m halvit_jax.main --config=configs/nextvit_digits.py --workdir=runs/nextvit_digits
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits


def get_config() -> ConfigDict:
    """The digits run of the hybrid of convolutions and attention."""
    return digits.nextvit("nextvit_small")
