import json
import pathlib
from typing import Any

import numpy as np
import pytest
from helpers import small_coco

from halvit_jax.data import coco, segments
from halvit_jax.data.coco import CocoIndex, read_index


def _index(folder: pathlib.Path, content: dict[str, Any], **fields: Any) -> CocoIndex:
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return read_index(str(path), field="instances.train_annotations", **fields)


def _with(*annotations: dict[str, Any]) -> dict[str, Any]:
    """One image of 40 x 60 and these annotations."""
    content = small_coco.content(1)
    return content | {"annotations": [entry | {"id": n} for n, entry in enumerate(annotations)]}


def test_an_index_has_the_images_and_their_objects(tmp_path: pathlib.Path) -> None:
    index = _index(tmp_path, small_coco.content())
    assert index.category_ids == (3, 7, 90)
    assert index.class_names == ("dog", "cat", "bird")
    assert index.names == [f"{n}.png" for n in range(7)]
    assert index.image_ids.tolist() == list(range(100, 107))
    assert index.count().tolist() == [1, 1, 2, 0, 1, 2, 0]
    assert index.dropped == {coco.CROWD: 1}
    assert index.notes == {}
    (first,) = index.objects(0)  # the RLE, which stands last in the file
    assert index.boxes[first].tolist() == [10, 2, 11, 14]
    assert index.labels[first] == 1
    assert index.bitmap(0, first).sum() == 12
    assert index.bitmap(0, first)[2:14, 10].all()
    one, two = index.objects(2)
    assert index.boxes[two].tolist() == [5, 5, 25, 16]
    assert index.bitmap(2, two)[5:16, 5:25].all()
    assert (index.labels[one], index.labels[two]) == (2, 1)
    assert index.areas[two] == 220


def test_every_annotation_that_is_no_ground_truth_is_counted_by_its_reason(tmp_path: pathlib.Path) -> None:
    box = small_coco.box
    content = _with(
        box(100, [0, 0, 10, 10]),
        box(100, [0, 0, 30, 30], iscrowd=1),
        box(100, [60, 5, 10, 10]),
        box(100, [-10, 5, 10, 10]),
        box(100, [5, 5, 0, 10]),
        box(100, [5, 5, -3, 10]),
        box(100, [5, 5, 10, 10], area=0),
        box(100, [5, 5, 0.5, 10]),
        box(100, [5, 5, 10, 10], segmentation=[[1, 1, 5, 5]]),
        box(100, [5, 5, 10, 10], segmentation=[]),
        box(100, [50, 30, 20, 20]),
    )
    index = _index(tmp_path, content)
    assert index.dropped == {coco.CROWD: 1, coco.OUTSIDE: 2, coco.NO_AREA: 3, coco.NO_SIDE: 1, coco.NO_MASK: 2}
    assert index.notes == {coco.CLIPPED: 1, segments.NO_POLYGON: 1}
    assert index.boxes.tolist() == [[0, 0, 10, 10], [50, 30, 60, 40]]
    assert len(content["annotations"]) == len(index.labels) + sum(index.dropped.values())


def test_without_masks_no_segmentation_is_read(tmp_path: pathlib.Path) -> None:
    index = _index(tmp_path, _with(small_coco.box(100, [0, 0, 9, 9], segmentation="no")), masks=False)
    assert index.segments is None
    assert len(index.labels) == 1
    assert index.bitmap(0, 0).shape == (40, 60)
    assert not index.bitmap(0, 0).any()


def test_a_missing_area_is_that_of_the_box(tmp_path: pathlib.Path) -> None:
    entry = small_coco.box(100, [0, 0, 9, 5])
    del entry["area"], entry["iscrowd"]
    index = _index(tmp_path, _with(entry))
    assert index.areas.tolist() == [45]
    assert index.notes == {coco.AREA_OF_BOX: 1}


def test_a_file_without_annotations_has_only_empty_images(tmp_path: pathlib.Path) -> None:
    index = _index(tmp_path, _with())
    assert index.count().tolist() == [0]


def test_correct_boxes_that_leave_an_image_are_not_taken_for_corners(tmp_path: pathlib.Path) -> None:
    boxes = [small_coco.box(100, [30, 20, 40, 30]), small_coco.box(100, [30, 5, 10, 10])]
    assert _index(tmp_path, _with(*boxes)).notes == {coco.CLIPPED: 1}


def test_a_file_is_described_with_all_its_numbers(tmp_path: pathlib.Path) -> None:
    content = small_coco.content()
    content["annotations"][0]["area"] = 50**2
    content["annotations"][1]["area"] = 100**2
    content["annotations"][2]["area"] = 0
    lines = coco.describe(_index(tmp_path, content), range(5))
    text = " | ".join(lines)
    for words in (
        "7 images, 5 of them used; 6 objects, at most 2 on an image, 2 images without any",
        "areas: 4 small, 1 medium, 1 large; crowds: 1",
        "no ground truth: 1 of no area",
        "objects a class: dog 2, cat 2, bird 2",
    ):
        assert words in text, text
    assert not np.any(["\n" in line for line in lines])


@pytest.mark.parametrize("length", [6, 7])
def test_flat_buffers_hold_what_the_file_says(length: int, tmp_path: pathlib.Path) -> None:
    polygon = [float(n) + 0.25 for n in (0, 0, 20, 0, 20, 20, 0)][:length]
    index = _index(tmp_path, _with(small_coco.box(100, [0, 0, 20, 20], segmentation=[polygon, [0, 0, 9, 0, 9, 9]])))
    assert len(index.segments.polygons(0)) == (2 if length == 6 else 1)
