"""Next-ViT-S on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/nextvit_small.py --workdir=runs/nextvit_small

Hardware: a TPU v5e-8, v4-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: 82.5. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of Next-ViT-S."""
    return imagenet.nextvit("nextvit_small", drop_path=0.1, variant=variant)
