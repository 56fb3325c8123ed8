"""Mini-Swin-B on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/mini_swin_base.py --workdir=runs/mini_swin_base

Labels alone; `configs/mini_swin_base.py:distilled` --config.teacher.init_from=SOURCE is
as published, taught by a Swin-B.
`configs/mini_swin_base.py:384` --config.init_from=SOURCE fine-tunes what was trained at 224 pixels at 384.
Hardware: a TPU v5e-16, v4-16 or 8 GPUs of 40 GB and more. Expected time: not measured.
Published top-1: 84.5 (distilled), 85.5 at 384. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of Mini-Swin-B."""
    return imagenet.mini_swin("mini_swin_base", drop_path=0.2, variant=variant)
