"""Swin-S on ImageNet-1k, 300 epochs: the unshared twin of mini_swin_small.

python -m halvit_jax.main --config=configs/swin_small.py --workdir=runs/swin_small

`configs/swin_small.py:384` --config.init_from=SOURCE fine-tunes what was trained at 224 pixels at 384.
Hardware: a TPU v5e-16, v4-16 or 8 GPUs of 40 GB and more. Expected time: not measured.
Published top-1: 83.0. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of Swin-S."""
    return imagenet.swin("swin_small", drop_path=0.3, variant=variant)
