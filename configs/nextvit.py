"""Next-ViT-S on ImageNet-1k, 300 epochs; B and L by adding :base or :large

python -m halvit_jax.main --config=configs/nextvit.py --workdir=runs/nextvit

`configs/nextvit.py:base,384` with --config.init_from=SOURCE fine-tunes at 384 pixels what was trained at 224.
Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more; B, L: a v5e-16 or 40 GB. Expected time: not measured.
Published top-1: 82.5, 83.2, 83.6; at 384: 83.6, 84.3, 84.7. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose

DROP_PATH = {"small": 0.1, "base": 0.2, "large": 0.2}
VARIANTS = (tuple(DROP_PATH), ("", "384"))


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of a Next-ViT."""
    size, recipe = choose(variant, *VARIANTS)
    return imagenet.nextvit(f"nextvit_{size}", drop_path=DROP_PATH[size], variant=recipe)
