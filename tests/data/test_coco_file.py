"""Every way in which an annotation file can be wrong has one line."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from helpers import small_coco

from halvit_jax.data.coco import read_index

NAN = float("nan")


def _images(**fields: Any) -> Callable[[dict], None]:
    return lambda content: content["images"][1].update(fields)


def _annotations(**fields: Any) -> Callable[[dict], None]:
    return lambda content: content["annotations"][0].update(fields)


def _corners(content: dict) -> None:
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x + 15, y + 15, x + 15 + w, y + 15 + h]
    content["annotations"] = [a for a in content["annotations"] if a["bbox"][2] < 36 and not a["iscrowd"]][:4]


def _empty(name: str) -> Callable[[dict], None]:
    return lambda content: content[name].clear()


WRONG = {
    "no images": (_empty("images"), "0 images; there is nothing to learn from it"),
    "no categories": (_empty("categories"), "0 categories"),
    "list missing": (lambda content: content.pop("categories"), "this one lacks categories"),
    "image id twice": (_images(id=100), "image ids that are there more than once: 100"),
    "image id text": (_images(id="101"), "image number 1 has id='101', which must be a whole number"),
    "image id large": (_images(id=2**31), "the image id 2147483648 does not fit into 32 bits"),
    "image without height": (_images(height=None), "image 101 has height=None, which must be a whole number"),
    "image of no width": (_images(width=0), "image 101 has width=0, which must be a whole number from 1 on"),
    "image without file": (_images(file_name=""), "image 101 has no file_name"),
    "category twice": (lambda c: c["categories"][0].update(id=3), "category ids that are there more than once: 3"),
    "category unnamed": (lambda c: c["categories"][0].pop("name"), "category 7 has no name"),
    "annotation twice": (_annotations(id=2), "annotation ids that are there more than once: 2"),
    "annotation true": (_annotations(id=True), "annotation number 0 has id=True"),
    "category unknown": (
        _annotations(category_id=4),
        "1 annotations have a category_id that categories does not list: 4",
    ),
    "category text": (_annotations(category_id="7"), "annotation 1 has category_id='7', which must be a whole number"),
    "image unknown": (_annotations(image_id=4), "1 annotations have a image_id that images does not list: 4"),
    "box of three": (_annotations(bbox=[1, 2, 3]), r"annotation 1 has bbox=\[1, 2, 3\], which must be 4 numbers"),
    "box missing": (_annotations(bbox=None), "annotation 1 has bbox=None"),
    "box NaN": (_annotations(bbox=[1, NAN, 3, 4]), "a bbox that is not finite: annotation 1"),
    "box infinite": (_annotations(bbox=[1, 2, float("inf"), 4]), "a bbox that is not finite: annotation 1"),
    "area NaN": (_annotations(area=NAN), "annotation 1 has an area that is no finite number"),
    "area text": (_annotations(area="big"), "annotation 1 has an area that is no finite number"),
    "corners": (
        _corners,
        r"boxes leave their images as COCO's \(x, y, width, height\), and all fit as \(x1, y1, x2, y2\)",
    ),
    "broken RLE": (
        _annotations(segmentation={"size": [60, 40], "counts": [5]}),
        "annotation 1 has a broken segmentation: an RLE of 5 pixels on an image of 60 x 40",
    ),
    "no masks": (
        lambda content: [entry.pop("segmentation") for entry in content["annotations"]],
        "no object has a segmentation; set instances.masks=False",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_content_that_cannot_be_meant_is_one_line_with_the_field_and_the_file(
    case: str, tmp_path: pathlib.Path
) -> None:
    spoil, words = WRONG[case]
    content = small_coco.content()
    spoil(content)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^instances.train_annotations='{path}': .*{words}") as caught:
        read_index(str(path), field="instances.train_annotations")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_json_of_coco_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "instances.json"
    for text, words in {None: "no such file", "{": "no JSON", "[]": "this one lacks images, annotations"}.items():
        if text is not None:
            path.write_text(text)
        with pytest.raises(ValueError, match=f"instances.eval_annotations='{path}': .*{words}"):
            read_index(str(path), field="instances.eval_annotations")
