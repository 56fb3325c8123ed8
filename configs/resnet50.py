"""ResNet-50 on ImageNet-1k with torchvision's V1 recipe, 90 epochs, or A2, 300: --config=configs/resnet50.py:a2

python -m halvit_jax.main --config=configs/resnet50.py --workdir=runs/resnet50

Hardware: one TPU v5e-4 or 4 GPUs of 16 GB and more. Expected time: not measured.
Published top-1: 76.13 (V1), 79.8 (A2). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose

VARIANTS = (tuple(imagenet.RESNET_RECIPES),)


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of ResNet-50."""
    (recipe,) = choose(variant, *VARIANTS)
    return imagenet.RESNET_RECIPES[recipe]("resnet50")
