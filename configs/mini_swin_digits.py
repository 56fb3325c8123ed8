"""A Mini-Swin on the embedded digits: two stages, two layers for each set of matrices.

python -m halvit_jax.main --config=configs/mini_swin_digits.py --workdir=runs/mini_swin_digits
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits


def get_config() -> ConfigDict:
    """The digits run of the shared model in windows."""
    return digits.mini_swin("mini_swin_tiny")
