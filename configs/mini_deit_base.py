"""Mini-DeiT-B on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/mini_deit_base.py --workdir=runs/mini_deit_base

Labels alone; `configs/mini_deit_base.py:distilled` --config.teacher.init_from=SOURCE is
as published, taught by a RegNetY-16GF.
`configs/mini_deit_base.py:384` --config.init_from=SOURCE fine-tunes what was trained at 224 pixels at 384.
Hardware: a TPU v5e-16, v4-16 or 8 GPUs of 40 GB and more. Expected time: not measured.
Published top-1: 83.2 (distilled), 84.9 at 384. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of Mini-DeiT-B."""
    return imagenet.mini_deit("mini_deit_base", drop_path=0.1, variant=variant)
