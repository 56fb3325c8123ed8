"""Next-ViT-S with hallucinated attention and compact FFNs on ImageNet-1k, 300 epochs: the twin of nextvit_small.

python -m halvit_jax.main --config=configs/nextvit_small_hc.py --workdir=runs/nextvit_small_hc

Half of the attention maps are made from the other half, and the second matrix of every FFN is two of half the rank. The
recipe is the host's, for no other is known.
Hardware: a TPU v5e-8, v4-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: none. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(variant: str = "300") -> ConfigDict:
    """The ImageNet run of the compact Next-ViT-S."""
    return imagenet.nextvit("nextvit_small_hc", drop_path=0.1, variant=variant)
