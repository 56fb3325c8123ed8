"""Detectors by name, and what is refused."""

from typing import Any

import pytest

from halvit_jax.detection import DETECTORS, create_detector
from halvit_jax.models import create_model


def _create(name: str = "mask_rcnn", **fields: Any) -> Any:
    return create_detector(name, create_model("resnet18", num_classes=0), **fields)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_field_of_none_keeps_its_default(name: str) -> None:
    assert _create(name, width=None) == _create(name) == DETECTORS[name](create_model("resnet18", num_classes=0))
    assert _create(name, width=64, dtype="bfloat16").width == 64
    assert _create(name, dtype="bfloat16").dtype == "bfloat16"


def test_an_unknown_detector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"detection\.detector='yolo' is not one of mask_rcnn, retinanet"):
        _create("yolo")


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("retinanet", "hidden", 128, r"detection\.hidden=128: retinanet has no such field; it has .*head_depth"),
        ("mask_rcnn", "backbone_", 1, r"detection\.backbone_=1: mask_rcnn has no such field"),
        ("mask_rcnn", "rpn_nms", 1.5, r"detection\.rpn_nms=1\.5 must lie between 0 and 1"),
        ("mask_rcnn", "detections", 0, r"detection\.detections=0 must be a whole number of at least 1"),
        ("mask_rcnn", "hidden", 12.5, r"detection\.hidden=12\.5 must be a whole number of at least 1"),
        ("retinanet", "anchor_scale", 0.0, r"detection\.anchor_scale=0\.0 must be above 0"),
    ],
)
def test_values_that_are_not_allowed_are_refused_by_field(name: str, field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _create(name, **{field: value})
