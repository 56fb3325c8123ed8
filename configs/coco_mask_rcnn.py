"""Mask R-CNN on COCO, 12 epochs, with a HaLViT-T backbone; any other by adding its name.

python -m halvit_jax.main --config=configs/coco_mask_rcnn.py --workdir=runs/coco_mask_rcnn \
    --config.instances.root=DIR --config.init_from=SOURCE

DIR holds COCO's `annotations/`, `train2017/` and `val2017/`; SOURCE is the workdir of the backbone's ImageNet run, or a
weight file. `configs/coco_mask_rcnn.py:pvt_tiny` and so on are the other backbones, `swin_tiny_3x` and `swin_small_3x`
the 36 epochs of the Swins.

Hardware: 8 GPUs of 24 GB, or a TPU v5e-16. Expected time: not measured. Published box / mask AP: halvit 35.3 / 33.3 and
42.3 / 39.2; pvt 36.7 / 35.1, 40.4 / 37.8, 42.0 / 39.0, 42.9 / 39.5; pvt_v2 box 38.2, 41.8, 45.3, 47.0, 47.5, 47.4;
shvit_s4 39.0 / 35.9; swin_tiny 42.7 / 39.3, 3x: 46.0 / 41.6 and 48.2 / 43.2; nextvit_small 45.9 / 41.8; resnet50
38.2 / 34.7. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import detection
from halvit_jax.recipes.variants import choose

LONG = "_3x"
VARIANTS = ((*detection.DETECTORS["mask_rcnn"], f"swin_tiny{LONG}", f"swin_small{LONG}"),)


def get_config(variant: str = "") -> ConfigDict:
    """The run of Mask R-CNN with one of the backbones."""
    (backbone,) = choose(variant, *VARIANTS)
    recipe = detection.coco_3x if backbone.endswith(LONG) else detection.coco
    return recipe("mask_rcnn", backbone.removesuffix(LONG))
