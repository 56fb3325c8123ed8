"""A PVT on the embedded digits: two stages, of 4x4 and 2x2 tokens.

python -m halvit_jax.main --config=configs/pvt_digits.py --workdir=runs/pvt_digits
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits


def get_config() -> ConfigDict:
    """The digits run of the pyramid."""
    return digits.pvt("pvt_tiny")
