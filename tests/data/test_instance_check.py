import pathlib
from typing import Any

import pytest
from helpers import small_coco
from PIL import Image

from halvit_jax.config import default_config
from halvit_jax.data.instance_check import check_instances
from halvit_jax.data.instance_loaders import make_detection_loaders
from halvit_jax.data.pipeline import Loaders
from halvit_jax.protocols import DataError


def _loaders(folder: pathlib.Path, batch_size: int = 2, **changes: Any) -> Loaders:
    content = small_coco.content()
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] != 90]
    content["annotations"][0]["area"] = 0
    files = small_coco.write(folder, content, small_coco.content(5))
    fields = {"canvases": ((40, 64), (64, 50), (33, 40)), "short_side": 0, **files, **changes}
    return make_detection_loaders(**default_config().instances.to_dict() | fields, batch_size=batch_size, seed=0)


def test_both_files_are_described_and_all_images_are_read(tmp_path: pathlib.Path) -> None:
    lines, warning = check_instances(_loaders(tmp_path), most=100)
    for words in (
        "train: " + str(tmp_path / "train.json") + ": 7 images, ",
        "train: no ground truth: 1 of no area",
        "train: objects a class: dog 1, cat 3, bird 0",
        "train: images not trained on: 3 without ground truth, 2 in a canvas with fewer images than a batch",
        "train: 4 images were read",
        "eval: areas: 5 small, 0 medium, 0 large; crowds: 1",
        "eval: 5 images were read",
    ):
        assert any(line.startswith(words) for line in lines), "\n".join(lines)
    assert warning == (
        "train: 1 classes have no object: bird; 2 images are never used: their canvas has fewer than a batch"
    )


def test_of_very_many_images_some_are_read(tmp_path: pathlib.Path) -> None:
    lines, _ = check_instances(_loaders(tmp_path), most=2)
    assert "eval: 2 images were read and have the size that the file says" in lines


def test_images_that_cannot_be_used_are_counted(tmp_path: pathlib.Path) -> None:
    loaders = _loaders(tmp_path)
    (tmp_path / "eval" / "0.png").write_bytes(b"no image")
    Image.new("RGB", (40, 50)).save(tmp_path / "eval" / "3.png")
    with pytest.raises(DataError, match=r"2 of 5 images cannot be used: .*0\.png cannot be decoded.*; and 1 more"):
        check_instances(loaders, most=100)
