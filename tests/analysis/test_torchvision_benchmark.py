"""What torchvision cannot be compared with. The comparison itself needs torch, which tests do not."""

import sys

import pytest

from halvit_jax.analysis.torchvision_benchmark import TorchvisionMaskRCNN
from halvit_jax.recipes import detection


@pytest.mark.parametrize(("detector", "backbone"), [("mask_rcnn", "pvt_tiny"), ("retinanet", "resnet50")])
def test_other_detectors_are_refused(detector: str, backbone: str) -> None:
    with pytest.raises(
        ValueError, match=r"--against=torch compares with torchvision's Mask R-CNN on resnet18, resnet50"
    ):
        TorchvisionMaskRCNN.check(detection.coco(detector, backbone))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"--against=torch needs torch and torchvision \(.*\): pip install torch"):
        TorchvisionMaskRCNN.check(detection.coco("mask_rcnn", "resnet50"))
