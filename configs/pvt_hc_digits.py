"""The same PVT with half of its attention maps hallucinated and compact feed-forward layers.

python -m halvit_jax.main --config=configs/pvt_hc_digits.py --workdir=runs/pvt_hc_digits
"""

from ml_collections import ConfigDict

from halvit_jax import recipes


def get_config() -> ConfigDict:
    """The digits run of the pyramid with fewer parameters."""
    return recipes.pvt_digits("pvt_tiny_hc")
