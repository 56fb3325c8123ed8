"""Mini-Swin-T on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/mini_swin_tiny.py --workdir=runs/mini_swin_tiny

Labels alone; `configs/mini_swin_tiny.py:distilled` --config.teacher.init_from=SOURCE is
as published, taught by a Swin-B.
Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: 81.3 (distilled). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of Mini-Swin-T."""
    return imagenet.mini_swin("mini_swin_tiny", drop_path=0.0, variant=variant)
