"""Mask R-CNN with a HaLViT backbone on embedded scenes of handwritten digits; nothing is downloaded.

python -m halvit_jax.main --config=configs/scenes_mask_rcnn.py --workdir=runs/scenes_mask_rcnn

`configs/scenes_mask_rcnn.py:deit_small` is the untied model of equal shape, `:regnety_002` a pyramid backbone.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import detection
from halvit_jax.recipes.variants import choose

VARIANTS = (tuple(detection.SCENES),)


def get_config(variant: str = "") -> ConfigDict:
    """The run of Mask R-CNN on the scenes."""
    (backbone,) = choose(variant, *VARIANTS)
    return detection.scenes("mask_rcnn", backbone)
