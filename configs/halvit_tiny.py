"""HaLViT-T on ImageNet-1k with the recipe of DeiT, 300 epochs, or 600 by adding --config.num_epochs=600

python -m halvit_jax.main --config=configs/halvit_tiny.py --workdir=runs/halvit_tiny

Hardware: a TPU v5e-8, v4-8 or 8 GPUs of 24 GB and more. Expected time: not measured; the arithmetic is that of DeiT-S.
Published top-1: 77.3 after 300 epochs, 78.8 after 600 (the paper's recipe is not public). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of HaLViT-T."""
    choose(variant)
    return imagenet.deit("halvit_tiny")
