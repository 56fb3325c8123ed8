"""The same PVT with half of its attention maps hallucinated and compact feed-forward layers.

python -m halvit_jax.main --config=configs/pvt_hc_digits.py --workdir=runs/pvt_hc_digits
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits


def get_config() -> ConfigDict:
    """The digits run of the pyramid with fewer parameters."""
    return digits.pvt("pvt_tiny_hc")
