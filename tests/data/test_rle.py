import sys

import numpy as np
import pytest
from pycocotools import mask as masks

from halvit_jax.data import rle


def _bitmap(height: int = 30, width: int = 40, share: float = 0.4) -> np.ndarray:
    return (np.random.default_rng(0).random((height, width)) < share).astype(np.uint8)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 1.0])
def test_runs_of_a_compressed_rle_are_those_that_pycocotools_wrote(share: float) -> None:
    bitmap = _bitmap(share=share)
    counts = masks.encode(np.asfortranarray(bitmap))["counts"]
    runs = rle.runs_of(counts)
    value = np.repeat(np.arange(len(runs)) % 2, runs).reshape(40, 30).T
    np.testing.assert_array_equal(value, bitmap)
    np.testing.assert_array_equal(rle.draw_runs(counts, 30, 40), bitmap)
    for given in (counts, counts.decode(), runs.tolist()):
        assert rle.compressed({"size": [30, 40], "counts": given}, 30, 40) == counts


def test_polygons_are_united() -> None:
    squares = [np.array([x, 0, x + 4, 0, x + 4, 4, x, 4], np.float32) for x in (0, 2, 10)]
    drawn = rle.draw_polygons(squares, 6, 16)
    assert drawn.sum() == 6 * 4 + 4 * 4
    assert drawn[:4, :6].all()


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ({"size": [40, 30], "counts": [1200]}, r"size \[40, 30\] on an image of 30 rows and 40 columns"),
        ({"counts": [1200]}, "size None on an image"),
        ({"size": [30, 40], "counts": [1000, 100]}, "1100 pixels on an image of 30 x 40"),
        ({"size": [30, 40], "counts": []}, "0 pixels on an image of 30 x 40"),
        ({"size": [30, 40], "counts": ""}, "0 pixels on an image of 30 x 40"),
        ({"size": [30, 40], "counts": [1300, -100]}, "not all whole numbers from 0 on"),
        ({"size": [30, 40], "counts": [1199.5, 0.5]}, "not all whole numbers from 0 on"),
        ({"size": [30, 40], "counts": "a\xff"}, "broken counts"),
        ({"size": [30, 40], "counts": "PPPPPPPPPPPP"}, "broken counts"),  # a number that does not end
        ({"size": [30, 40], "counts": "PPPPPPPPPPPP0"}, "broken counts"),  # a number of more than 32 bits
        ({"size": [30, 40], "counts": "O"}, "a negative run"),
        ({"size": [30, 40], "counts": 3}, "counts are int, not a list or a text"),
    ],
)
def test_an_rle_that_does_not_fill_its_image_is_broken(segmentation: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rle.compressed(segmentation, 30, 40)


def test_a_missing_pycocotools_is_answered_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rle.coco_masks.cache_clear()
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ValueError, match=r"need pycocotools; install it with: pip install 'pycocotools>="):
        rle.coco_masks()
