"""SHViT-S1 on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/shvit_s1.py --workdir=runs/shvit_s1

`configs/shvit_s1.py:distilled` with --config.teacher.init_from=SOURCE is taught by a RegNetY-16GF.
`configs/shvit_s1.py:384` (or `:512`) --config.init_from=SOURCE fine-tunes what was trained before, larger.
Hardware: a TPU v5e-8, v4-8 or 8 GPUs of 16 GB and more. Expected time: not measured.
Published top-1: 72.8 (raw weights). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of SHViT-S1."""
    return imagenet.shvit("shvit_s1", variant=variant)
