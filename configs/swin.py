"""Swin-T on ImageNet-1k, 300 epochs, the baseline of mini_swin; S and B by adding :small or :base

python -m halvit_jax.main --config=configs/swin.py --workdir=runs/swin

`configs/swin.py:base,384` with --config.init_from=SOURCE fine-tunes at 384 pixels what was trained at 224.
Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more; S, B: a v5e-16 or 40 GB. Expected time: not measured.
Published top-1: 81.3, 83.0, 83.5; B at 384: 84.5. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose

DROP_PATH = {"tiny": 0.2, "small": 0.3, "base": 0.5}
VARIANTS = (tuple(DROP_PATH), ("", "384"))


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of a Swin Transformer."""
    size, recipe = choose(variant, *VARIANTS)
    return imagenet.swin(f"swin_{size}", drop_path=DROP_PATH[size], variant=recipe)
