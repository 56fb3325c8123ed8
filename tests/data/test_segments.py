import json
import pathlib
from collections import Counter
from typing import Any

import numpy as np
import pytest

from halvit_jax.data import segments


def test_bitmaps_are_those_of_pycocotools_for_every_form(golden: pathlib.Path) -> None:
    info = json.loads((golden / "detection/masks.json").read_text())
    h, w, given = info["height"], info["width"], info["segmentations"]
    notes: Counter = Counter()
    packed, there = segments.pack(segments.read({"id": n, "segmentation": s}, h, w, notes) for n, s in enumerate(given))
    assert there.all()
    assert {type(segmentation) for segmentation in given} == {list, dict}
    bits = np.load(golden / "detection/masks.npz")["bitmaps"]
    expected = np.unpackbits(bits)[: len(given) * h * w].reshape(-1, h, w)
    np.testing.assert_array_equal([packed.draw(n, h, w) for n in range(len(given))], expected)


def test_forms_may_follow_each_other_in_any_order() -> None:
    square, bar = [1, 1, 3, 1, 3, 3, 1, 3], [0, 4, 6, 4, 6, 5, 0, 5]
    runs = {"size": [6, 6], "counts": [6, 12, 18]}
    given = [runs, [square, bar], [], runs, None, [bar]]
    notes: Counter = Counter()
    packed, there = segments.pack(segments.read({"id": 0, "segmentation": s}, 6, 6, notes) for s in given)
    assert there.tolist() == [True, True, False, True, False, True]
    assert [packed.draw(n, 6, 6).sum() for n in range(4)] == [12, 4 + 6, 12, 6]
    assert packed.draw(0, 6, 6)[:, 1:3].all()
    assert not notes[segments.NO_POLYGON]


def test_polygons_that_are_none_are_left_out_and_counted() -> None:
    notes: Counter = Counter()
    line, odd, square = [0, 0, 4, 4], [0, 0, 4, 0, 4, 4, 0], [0, 0, 4, 0, 4, 4, 0, 4]
    assert segments.read({"id": 1, "segmentation": [line]}, 9, 9, notes) is None
    (kept,) = segments.read({"id": 2, "segmentation": [odd, square, line]}, 9, 9, notes)
    assert kept.tolist() == square
    assert notes == {segments.NO_POLYGON: 3}


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([0, 0, 4, 0, 4, 4], "neither an RLE nor a list of polygons"),
        ("lPk0", "neither an RLE nor a list of polygons"),
        ([[0, 0, 4, 0, float("nan"), 4]], "a polygon that is not a list of finite numbers"),
        ([[[0, 0], [4, 0], [4, 4]]], "a polygon that is not a list of finite numbers"),
        ([["a", 0, 4, 0, 4, 4]], "could not convert"),
        ({"size": [9, 9], "counts": [80]}, "80 pixels on an image of 9 x 9"),
    ],
)
def test_a_broken_segmentation_is_named_by_its_annotation(segmentation: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"annotation 31 has a broken segmentation: .*{words}"):
        segments.read({"id": 31, "segmentation": segmentation}, 9, 9, Counter())


def test_all_segmentations_lie_in_flat_arrays() -> None:
    packed, _ = segments.pack(iter([[np.arange(6, dtype=np.float32)], b"12"]))
    assert packed.points.dtype == np.float32
    assert packed.runs.tobytes() == b"12"
