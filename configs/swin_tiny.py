"""Swin-T on ImageNet-1k, 300 epochs: the unshared twin of mini_swin_tiny.

python -m halvit_jax.main --config=configs/swin_tiny.py --workdir=runs/swin_tiny

Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: 81.3. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of Swin-T."""
    return imagenet.swin("swin_tiny", drop_path=0.2, variant=variant)
