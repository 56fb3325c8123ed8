"""RegNetY-16GF on ImageNet-1k with the recipe of DeiT, 300 epochs: the teacher of DeiT, SHViT and Mini-DeiT.

python -m halvit_jax.main --config=configs/regnety.py --workdir=runs/regnety

Then --config.teacher.init_from=runs/regnety distils from it.
Hardware: a TPU v5e-16 or 8 GPUs of 40 GB and more. Expected time: not measured.
Published top-1: 82.9. DeiT's paper states its data and augmentation, and not its optimizer. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of a RegNetY-16GF."""
    choose(variant)
    return imagenet.regnety("regnety_160")
