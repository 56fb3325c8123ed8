"""Swin-B on ImageNet-1k, 300 epochs: the unshared twin of mini_swin_base.

python -m halvit_jax.main --config=configs/swin_base.py --workdir=runs/swin_base

`configs/swin_base.py:384` --config.init_from=SOURCE fine-tunes what was trained at 224 pixels at 384.
Hardware: a TPU v5e-16, v4-16 or 8 GPUs of 40 GB and more. Expected time: not measured.
Published top-1: 83.5, 84.5 at 384. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of Swin-B."""
    return imagenet.swin("swin_base", drop_path=0.5, variant=variant)
