"""HaLViT-ResNet-50 on ImageNet-1k with torchvision's V1 recipe, 90 epochs; another one by adding :v2, :a1, :a2 or :a3

python -m halvit_jax.main --config=configs/halvit_resnet50.py --workdir=runs/halvit_resnet50

Hardware: one TPU v5e-4 or 4 GPUs of 16 GB and more. Expected time: not measured.
Published top-1: 75.1. Its recipe is not public; the baselines beside it (69.7, 76.1) are torchvision's V1 weights, so
that recipe is the natural reading. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import resnet
from halvit_jax.recipes.variants import choose

VARIANTS = (tuple(resnet.RECIPES),)


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of HaLViT-ResNet-50."""
    (recipe,) = choose(variant, *VARIANTS)
    return resnet.RECIPES[recipe]("halvit_resnet50")
