"""Mini-DeiT-Ti on ImageNet-1k, 300 epochs; S and B by adding :small or :base

python -m halvit_jax.main --config=configs/mini_deit.py --workdir=runs/mini_deit

Trained on the labels alone; `configs/mini_deit.py:base,distilled` with --config.teacher.init_from=SOURCE is as
published, distilled from a RegNetY-16GF. `configs/mini_deit.py:base,384` with --config.init_from=SOURCE fine-tunes at
384 pixels what was trained at 224.
Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more; B: a v5e-16 or 40 GB. Expected time: not measured.
Published top-1 (distilled): 73.0, 80.9, 83.2; B at 384: 84.9. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose

DROP_PATH = {"tiny": 0.0, "small": 0.0, "base": 0.1}
VARIANTS = (tuple(DROP_PATH), ("", "distilled", "384"))


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of a Mini-DeiT."""
    size, recipe = choose(variant, *VARIANTS)
    return imagenet.mini_deit(f"mini_deit_{size}", drop_path=DROP_PATH[size], variant=recipe)
