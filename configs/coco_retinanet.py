"""RetinaNet on COCO, 12 epochs, with a PVT-Tiny backbone; any other by adding its name.

python -m halvit_jax.main --config=configs/coco_retinanet.py --workdir=runs/coco_retinanet \
    --config.instances.root=DIR --config.init_from=SOURCE

DIR holds COCO's `annotations/`, `train2017/` and `val2017/`; SOURCE is the workdir of the backbone's ImageNet run, or a
weight file. `configs/coco_retinanet.py:shvit_s4` and so on are the other backbones.

Hardware: 8 GPUs of 24 GB, or a TPU v5e-16. Expected time: not measured.
Published AP: pvt 36.7, 40.4, 41.9, 42.6; shvit_s4 38.8. Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import detection
from halvit_jax.recipes.variants import choose

VARIANTS = (detection.DETECTORS["retinanet"],)


def get_config(variant: str = "") -> ConfigDict:
    """The run of RetinaNet with one of the backbones."""
    (backbone,) = choose(variant, *VARIANTS)
    return detection.coco("retinanet", backbone)
