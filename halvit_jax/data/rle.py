"""Segmentations of COCO files: polygons and both kinds of RLE, checked, and drawn as bitmaps by pycocotools.

Shapes: `h w` image, `p` polygons.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from halvit_jax.text import pip_install


@functools.cache
def coco_masks() -> Any:
    """The module `pycocotools.mask`.

    Raises:
        ValueError: it is not installed, with the command that installs it.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ValueError(
            f"masks of COCO files need pycocotools; install it with: {pip_install('detection')}"
        ) from error
    return mask


def draw_polygons(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """The union of polygons (x, y, x, y, ... each) as a bitmap, uint8 [h, w]."""
    masks = coco_masks()
    parts = masks.frPyObjects([polygon.tolist() for polygon in polygons], height, width)
    return masks.decode(masks.merge(parts))


def draw_runs(counts: bytes, height: int, width: int) -> np.ndarray:
    """A compressed RLE as a bitmap, uint8 [h, w]."""
    return coco_masks().decode({"size": [height, width], "counts": counts})


def compressed(segmentation: Mapping[str, Any], height: int, width: int) -> bytes:
    """The compressed counts of an RLE of either kind, for an image of this height and width.

    Raises:
        ValueError: the size is not the image's, or the runs are broken or do not fill it. Decoding such runs would read
            memory that nobody has written.
    """
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if list(size) != [height, width] if isinstance(size, Sequence) else True:
        raise ValueError(f"an RLE of size {size} on an image of {height} rows and {width} columns")
    if isinstance(counts, list):
        runs = np.asarray(counts) if counts else np.zeros(0, np.int64)
        if runs.dtype.kind not in "iu" or (runs < 0).any():
            raise ValueError("an RLE whose counts are not all whole numbers from 0 on")
        _fill(int(runs.sum()), height, width)
        return coco_masks().frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
    if isinstance(counts, str | bytes):
        given = counts.encode() if isinstance(counts, str) else counts
        runs = runs_of(given)
        if (runs < 0).any():
            raise ValueError("an RLE with a negative run")
        _fill(int(runs.sum()), height, width)
        return given
    raise ValueError(f"an RLE whose counts are {type(counts).__name__}, not a list or a text")


def runs_of(counts: bytes) -> np.ndarray:
    """The lengths of the runs of a compressed RLE, alternating between background and object: int64 [runs].

    Groups of five bits, lowest first, the sixth saying that another follows; from the fourth run on the difference to
    the run before the last (pycocotools `rleFrString`).

    Raises:
        ValueError: a byte that no RLE has, or an end in the middle of a number.
    """
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(codes):
        return np.zeros(0, np.int64)
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("an RLE with broken counts")
    last = np.flatnonzero(~codes & 32)  # the last group of every number
    lengths = np.diff(last, prepend=-1)
    if lengths.max() > 7:
        raise ValueError("an RLE with broken counts")
    place = np.arange(len(codes)) - np.repeat(last - lengths + 1, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), last - lengths + 1)
    runs -= np.where(codes[last] & 16, 1 << (5 * lengths), 0)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs


def _fill(total: int, height: int, width: int) -> None:
    if total != height * width:
        raise ValueError(f"an RLE of {total} pixels on an image of {height} x {width}")
