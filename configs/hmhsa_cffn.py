"""Half of the attention maps hallucinated and compact FFNs (hMHSA + cFFN) on ImageNet-1k, 300 epochs, in a DeiT-S.

python -m halvit_jax.main --config=configs/hmhsa_cffn.py --workdir=runs/hmhsa_cffn

`configs/hmhsa_cffn.py:pvt_tiny` and `:nextvit_small` are the same in another baseline. The recipe is the baseline's,
because no other is known.
Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: none for these models. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose

RECIPES = {
    "deit_small": imagenet.deit,
    "pvt_tiny": imagenet.pvt,
    "nextvit_small": lambda model: imagenet.nextvit(model, drop_path=0.1),
}
VARIANTS = (tuple(RECIPES),)


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of a baseline with hallucinated attention and compact feed-forward layers."""
    (baseline,) = choose(variant, *VARIANTS)
    return RECIPES[baseline](f"{baseline}_hc")
