"""A HaLViT on digits, half of the weights, distilled from its untied baseline of vit_digits: two minutes.

python -m halvit_jax.main --config=configs/distill_digits.py --workdir=runs/distill_digits

The teacher is runs/vit_digits, or another workdir or weight file: `--config.teacher.init_from=SOURCE`. As in DeiT, a
second token and classifier learn the teacher's labels. With `configs/distill_digits.py:soft` the student has one
classifier and learns the teacher's probabilities and, as in MiniViT, the relations between its tokens in every block.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits
from halvit_jax.recipes.variants import choose

VARIANTS = (("hard", "soft"),)


def get_config(variant: str = "") -> ConfigDict:
    """The digits run of the tied model, with a teacher."""
    (kind,) = choose(variant, *VARIANTS)
    return digits.distilled("halvit_tiny", kind)
