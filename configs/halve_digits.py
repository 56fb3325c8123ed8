"""A HaLViT made from the trained ViT of vit_digits, half of its weights: two commands, two minutes.

python -m halvit_jax.halve --config=configs/halve_digits.py --out=runs/halve_digits.safetensors
python -m halvit_jax.main --config=configs/halve_digits.py --workdir=runs/halve_digits

The first ties the kernels of the teacher, runs/vit_digits, or another workdir or weight file: `--teacher=SOURCE`. The
second distils its result, `init_from`, for 100 steps.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits
from halvit_jax.recipes.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """The digits run of the halved model."""
    choose(variant)
    return digits.halved("halvit_tiny")
