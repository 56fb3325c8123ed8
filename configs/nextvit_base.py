"""Next-ViT-B on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/nextvit_base.py --workdir=runs/nextvit_base

Hardware: a TPU v5e-16, v4-16 or 8 GPUs of 40 GB and more. Expected time: not measured.
Published top-1: 83.2. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of Next-ViT-B."""
    return imagenet.nextvit("nextvit_base", drop_path=0.2, variant=variant)
