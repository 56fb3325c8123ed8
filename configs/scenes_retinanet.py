"""RetinaNet with a small RegNetY on embedded scenes of handwritten digits; nothing is downloaded.

python -m halvit_jax.main --config=configs/scenes_retinanet.py --workdir=runs/scenes_retinanet
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import detection
from halvit_jax.recipes.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """The run of RetinaNet on the scenes."""
    choose(variant)
    return detection.scenes("retinanet", "regnety_002")
