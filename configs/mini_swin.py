"""Mini-Swin-T on ImageNet-1k, 300 epochs; S and B by adding :small or :base

python -m halvit_jax.main --config=configs/mini_swin.py --workdir=runs/mini_swin

Trained on the labels alone; `configs/mini_swin.py:small,distilled` with --config.teacher.init_from=SOURCE is as
published, distilled from a Swin-B. `configs/mini_swin.py:base,384` with --config.init_from=SOURCE fine-tunes at 384
pixels what was trained at 224.
Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more; S, B: a v5e-16 or 40 GB. Expected time: not measured.
Published top-1 (distilled): 81.3, 83.9, 84.5; B at 384: 85.5. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose

DROP_PATH = {"tiny": 0.0, "small": 0.1, "base": 0.2}
VARIANTS = (tuple(DROP_PATH), ("", "distilled", "384"))


def get_config(variant: str = "") -> ConfigDict:
    """The ImageNet run of a Mini-Swin."""
    size, recipe = choose(variant, *VARIANTS)
    return imagenet.mini_swin(f"mini_swin_{size}", drop_path=DROP_PATH[size], variant=recipe)
