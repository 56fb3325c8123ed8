"""SHViT-S4 on ImageNet-1k at 256 pixels, 300 epochs.

python -m halvit_jax.main --config=configs/shvit_s4.py --workdir=runs/shvit_s4

`configs/shvit_s4.py:distilled` with --config.teacher.init_from=SOURCE is taught by a RegNetY-16GF.
`configs/shvit_s4.py:384` (or `:512`) --config.init_from=SOURCE fine-tunes what was trained before, larger.
Hardware: a TPU v5e-8, v4-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: 79.4 (raw weights). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of SHViT-S4."""
    return imagenet.shvit("shvit_s4", variant=variant)
