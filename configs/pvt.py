"""PVT-Tiny on ImageNet-1k, 300 epochs; the other sizes and PVTv2 by adding :small, ..., :v2_b0, ...

python -m halvit_jax.main --config=configs/pvt.py --workdir=runs/pvt

Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more; from Medium and B3 on a v5e-16 or 40 GB. Expected time: not measured.
Published top-1: 75.1, 79.8, 81.2, 81.7; PVTv2: 70.5, 78.7, 82.0, 82.1 (Li), 83.1, 83.6, 83.8. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose

V2 = ("v2_b0", "v2_b1", "v2_b2", "v2_b2_li", "v2_b3", "v2_b4", "v2_b5")
VARIANTS = (("tiny", "small", "medium", "large", *V2),)


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of a PVT or PVTv2."""
    (size,) = choose(variant, *VARIANTS)
    return imagenet.pvt(f"pvt_{size}")
