"""vit_digits with hallucinated attention and compact feed-forward layers.

python -m halvit_jax.main --config=configs/vit_hc_digits.py --workdir=runs/vit_hc_digits
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits


def get_config() -> ConfigDict:
    """The digits run of the cheaper twin."""
    return digits.vit("deit_small_hc")
