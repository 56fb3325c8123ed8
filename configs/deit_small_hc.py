"""DeiT-S with hallucinated attention and compact feed-forward layers on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/deit_small_hc.py --workdir=runs/deit_small_hc

Hardware: as configs/deit_small.py. Expected time: not measured.
Published top-1: none that we know. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(epochs: str = "300") -> ConfigDict:
    """The ImageNet run of DeiT-S's cheaper twin."""
    return imagenet.deit("deit_small_hc", epochs=int(epochs))
