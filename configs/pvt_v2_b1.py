"""PVTv2-B1 on ImageNet-1k, 300 epochs.

python -m halvit_jax.main --config=configs/pvt_v2_b1.py --workdir=runs/pvt_v2_b1

Hardware: a TPU v5e-8 or 8 GPUs of 24 GB and more. Expected time: not measured.
Published top-1: 78.7. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet


def get_config(epochs: str = "300") -> ConfigDict:
    """The ImageNet run of PVTv2-B1."""
    return imagenet.pvt("pvt_v2_b1", epochs=int(epochs))
