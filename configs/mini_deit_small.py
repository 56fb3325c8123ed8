"""Mini-DeiT-S on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/mini_deit_small.py --workdir=runs/mini_deit_small

Labels alone; `configs/mini_deit_small.py:distilled` --config.teacher.init_from=SOURCE is
as published, taught by a RegNetY-16GF.
Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: 80.9 (distilled). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of Mini-DeiT-S."""
    return imagenet.mini_deit("mini_deit_small", drop_path=0.0, variant=variant)
