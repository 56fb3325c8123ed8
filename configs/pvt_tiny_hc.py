"""PVT-Tiny with half of its attention maps hallucinated and compact FFNs, on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/pvt_tiny_hc.py --workdir=runs/pvt_tiny_hc

Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: none in reach. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(epochs: str = "300") -> ConfigDict:
    """The ImageNet run of PVT-Tiny with hallucinated attention and compact feed-forward layers."""
    return imagenet.pvt("pvt_tiny_hc", epochs=int(epochs))
