"""ResNet-50 on ImageNet-1k; ResNet-18 and -101 and ResNeXt-101 32x8d by adding :18, :101 or :x101

python -m halvit_jax.main --config=configs/resnet.py --workdir=runs/resnet

The recipe is torchvision's V1 (90 epochs), or a second variant: `configs/resnet.py:50,v2` is its V2 (600 epochs), `a1`,
`a2` and `a3` are those of "ResNet strikes back" (600, 300 and 100 epochs).
Hardware: one TPU v5e-4 or 4 GPUs of 16 GB and more; 101 and x101: 8 GPUs of 24 GB. Expected time: not measured.
Published top-1: 76.13 (v1), 80.86 (v2), 80.4 (a1), 79.8 (a2), 78.1 (a3); 18: 69.76 (v1); 101: 77.37 (v1), 81.89 (v2);
x101: 79.31 (v1), 82.83 (v2). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import resnet
from halvit_jax.recipes.variants import choose

SIZES = {"50": "resnet50", "18": "resnet18", "101": "resnet101", "x101": "resnext101_32x8d"}
VARIANTS = (tuple(SIZES), tuple(resnet.RECIPES))


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of a ResNet or ResNeXt."""
    size, recipe = choose(variant, *VARIANTS)
    return resnet.RECIPES[recipe](SIZES[size])
