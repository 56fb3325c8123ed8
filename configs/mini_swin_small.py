"""Mini-Swin-S on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/mini_swin_small.py --workdir=runs/mini_swin_small

Labels alone; `configs/mini_swin_small.py:distilled` --config.teacher.init_from=SOURCE is
as published, taught by a Swin-B.
Hardware: a TPU v5e-16, v4-16 or 8 GPUs of 40 GB and more. Expected time: not measured.
Published top-1: 83.9 (distilled). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of Mini-Swin-S."""
    return imagenet.mini_swin("mini_swin_small", drop_path=0.1, variant=variant)
