"""Detections drawn over their image."""

import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from halvit_jax.cli import drawing
from halvit_jax.detection.coco_metric import encode_masks


def test_a_drawing_has_the_box_and_the_mask(tmp_path: pathlib.Path) -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    bits = np.zeros((1, 60, 80), bool)
    bits[0, 20:40, 30:50] = True
    found = {"class": "cat", "category_id": 0, "score": 0.5, "bbox": [30, 20, 20, 20]}
    (rle,) = encode_masks(bits)
    for name, detections in (("none", []), ("box", [found]), ("mask", [found | {"segmentation": rle}])):
        drawing.draw(image, detections, tmp_path / f"{name}.png")
    files = [tmp_path / f"{name}.png" for name in ("none", "box", "mask")]
    none, box, mask = (np.asarray(Image.open(file))[..., :3].astype(int) for file in files)
    assert none.shape == (360, 480, 3)
    assert none.max() == 0
    assert box[120, 180:300].max() > 100  # the upper edge
    assert box[180, 240].max() == 0
    assert mask[180, 240, 0] > 80


def test_what_cannot_be_drawn_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"--draw=.*out is for runs with task\.name='detection', and this one"):
        drawing.check(False, out, ["a.png"])
    with pytest.raises(ValueError, match=r"two images would be written to .*out/a\.png"):
        drawing.check(True, out, ["x/a.png", "y/a.jpg"])
    drawing.check(True, out, ["a.png", "b.png"])
    assert (tmp_path / "out").is_dir()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="--draw needs matplotlib"):
        drawing.check(True, out, ["a.png"])
