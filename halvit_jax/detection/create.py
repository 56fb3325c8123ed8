"""Detectors by name: `DETECTORS` lists them, `create_detector` builds one on a backbone."""

import dataclasses
from typing import Any

from flax import linen as nn

from halvit_jax.detection.detector import Detector
from halvit_jax.detection.mask_rcnn import MaskRCNN
from halvit_jax.detection.retinanet import RetinaNet

DETECTORS: dict[str, type[Detector]] = {"mask_rcnn": MaskRCNN, "retinanet": RetinaNet}
SHARES = ("rpn_positives", "roi_positives", "rpn_nms", "box_nms", "score_threshold")
GIVEN = ("parent", "name", "backbone", "dtype")  # fields that are no choice of a config


def create_detector(name: str, backbone: nn.Module, *, dtype: Any = None, **overrides: Any) -> Detector:
    """The detector `name` on a backbone, with any of its fields overridden.

    An override of None keeps the detector's default, so a config may list the fields of all detectors.

    Raises:
        ValueError: an unknown name, a field that this detector lacks, or a value that is not allowed, by config field.
    """
    if name not in DETECTORS:
        raise ValueError(f"detection.detector={name!r} is not one of {', '.join(DETECTORS)}")
    given = {field: value for field, value in overrides.items() if value is not None}
    fields = {field.name: field.type for field in dataclasses.fields(DETECTORS[name]) if field.name not in GIVEN}
    for field, value in given.items():
        if field not in fields:
            raise ValueError(f"detection.{field}={value!r}: {name} has no such field; it has {', '.join(fields)}")
        if field in SHARES:
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"detection.{field}={value} must lie between 0 and 1")
        elif fields[field] is int and (not isinstance(value, int) or value < 1):
            raise ValueError(f"detection.{field}={value} must be a whole number of at least 1")
        elif fields[field] is float and value <= 0:
            raise ValueError(f"detection.{field}={value} must be above 0")
    return DETECTORS[name](backbone, dtype=dtype, **given)
