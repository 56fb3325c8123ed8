"""Every other family on the 1,797 digits that ship inside scikit-learn, in minutes.

python -m halvit_jax.main --config=configs/digits.py --workdir=runs/digits

Without a variant it is a Mini-DeiT: vit_digits with two layers for each set of matrices. `configs/digits.py:swin` and
so on is another family; `_hc` has hallucinated attention and compact FFNs.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits
from halvit_jax.recipes.variants import choose

RECIPES = {
    "mini_deit": lambda: digits.vit("mini_deit_tiny"),
    "vit_hc": lambda: digits.vit("deit_small_hc"),
    "swin": lambda: digits.swin("swin_tiny"),
    "mini_swin": lambda: digits.mini_swin("mini_swin_tiny"),
    "pvt": lambda: digits.pvt("pvt_tiny"),
    "pvt_hc": lambda: digits.pvt("pvt_tiny_hc"),
    "nextvit": lambda: digits.nextvit("nextvit_small"),
    "nextvit_hc": lambda: digits.nextvit("nextvit_small_hc"),
    "shvit": digits.shvit,
}
VARIANTS = (tuple(RECIPES),)


def get_config(variant: str = "") -> ConfigDict:
    """The digits run of a family."""
    (family,) = choose(variant, *VARIANTS)
    return RECIPES[family]()
