"""The compact twin of nextvit_digits: hallucinated attention maps and factorised FFNs.

python -m halvit_jax.main --config=configs/nextvit_hc_digits.py --workdir=runs/nextvit_hc_digits
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits


def get_config() -> ConfigDict:
    """The digits run of the compact hybrid."""
    return digits.nextvit("nextvit_small_hc")
