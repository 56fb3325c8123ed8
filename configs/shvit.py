"""SHViT-S1 on ImageNet-1k, 300 epochs; S2, S3 and S4 by adding :s2, :s3 or :s4

python -m halvit_jax.main --config=configs/shvit.py --workdir=runs/shvit

`configs/shvit.py:s2,distilled` with --config.teacher.init_from=SOURCE learns from a RegNetY-16GF.
`configs/shvit.py:s2,384` (or `512`) with --config.init_from=SOURCE fine-tunes at more pixels what was trained at 224.
Hardware: a TPU v5e-8 or 8 GPUs of 16 GB and more; S3, S4: 24 GB. Expected time: not measured.
Published top-1 (non-EMA weights): 72.8, 75.2, 77.4, 79.4; distilled: 74.0, 76.2, 78.3, 80.2; S4 at
512: 82.0. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose

VARIANTS = (("s1", "s2", "s3", "s4"), ("", "distilled", "384", "512"))


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of a SHViT."""
    size, recipe = choose(variant, *VARIANTS)
    return imagenet.shvit(f"shvit_{size}", variant=recipe)
