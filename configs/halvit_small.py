"""HaLViT-M ("Small") on ImageNet-1k with the recipe of DeiT, 300 epochs.

python -m halvit_jax.main --config=configs/halvit_small.py --workdir=runs/halvit_small

Hardware: a TPU v5e-16, v4-16 or 8 GPUs of 40 GB and more. Expected time: not measured;
the arithmetic is that of DeiT-B.
Published top-1: 81.3 (the paper's recipe is not public). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of HaLViT-M."""
    choose(variant)
    return imagenet.deit("halvit_small")
