"""Mini-DeiT-Ti on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/mini_deit_tiny.py --workdir=runs/mini_deit_tiny

Labels alone; `configs/mini_deit_tiny.py:distilled` --config.teacher.init_from=SOURCE is
as published, taught by a RegNetY-16GF.
Hardware: a TPU v5e-4 or 4 GPUs of 16 GB and more. Expected time: not measured.
Published top-1: 73.0 (distilled). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of Mini-DeiT-Ti."""
    return imagenet.mini_deit("mini_deit_tiny", drop_path=0.0, variant=variant)
