"""Masks of 28 x 28 probabilities drawn into an image, on the host with NumPy.

Sources: mmdetection 3.3 `_do_paste_mask`, torchvision `paste_masks_in_image`.

Shapes: `n` masks, `r` rows and columns of one.
"""

import numpy as np


def paste(
    probabilities: np.ndarray, boxes: np.ndarray, height: int, width: int, *, threshold: float = 0.5
) -> np.ndarray:
    """Masks of the whole image: probabilities [n, r, r], boxes [n, 4] -> bool [n, height, width].

    The centre of pixel i, i + 1/2, is mapped into its box, and the probability there is bilinear between the centres
    of the mask's cells, with 0 outside of the mask; at or above `threshold` is foreground. A box of no area draws
    nothing.
    """
    drawn = np.zeros((len(probabilities), height, width), bool)
    for mask, box, out in zip(probabilities, boxes, drawn, strict=True):
        x1, y1, x2, y2 = (float(side) for side in box)
        if not (x2 > x1 and y2 > y1):
            continue
        rows, columns = _reach(y1, y2, height), _reach(x1, x2, width)
        down = _interpolation(rows, y1, y2, mask.shape[0])
        across = _interpolation(columns, x1, x2, mask.shape[1])
        values = down @ mask.astype(np.float32) @ across.T
        out[rows.start : rows.stop, columns.start : columns.stop] = values >= threshold
    return drawn


def paste_torchvision(
    probabilities: np.ndarray, boxes: np.ndarray, height: int, width: int, *, threshold: float = 0.5
) -> np.ndarray:
    """As torchvision draws them: padded by a cell, enlarged to whole pixels, then the same threshold."""
    drawn = np.zeros((len(probabilities), height, width), bool)
    size = probabilities.shape[-1]
    scale = np.float32((size + 2) / size)
    for mask, box, out in zip(probabilities, boxes.astype(np.float32), drawn, strict=True):
        centre, half = (box[:2] + box[2:]) * np.float32(0.5), (box[2:] - box[:2]) * np.float32(0.5) * scale
        x1, y1, x2, y2 = (int(side) for side in (*(centre - half), *(centre + half)))
        padded = np.pad(mask.astype(np.float32), 1)
        down, across = (_enlargement(max(b - a + 1, 1), size + 2) for a, b in ((y1, y2), (x1, x2)))
        top, left = max(y1, 0), max(x1, 0)
        bottom, right = max(min(y2 + 1, height), top), max(min(x2 + 1, width), left)
        values = down[top - y1 : bottom - y1] @ padded @ across[left - x1 : right - x1].T
        out[top:bottom, left:right] = values >= threshold
    return drawn


def _reach(start: float, end: float, size: int) -> range:
    """The pixels of an axis that a box may colour."""
    first = int(np.clip(np.floor(start) - 1, 0, size))
    return range(first, int(np.clip(np.ceil(end) + 1, first, size)))


def _interpolation(pixels: range, start: float, end: float, cells: int) -> np.ndarray:
    """The weight of each cell at the centre of each pixel: [pixels, cells], 0 outside of the cells."""
    centres = np.arange(pixels.start, pixels.stop, dtype=np.float32) + np.float32(0.5)
    place = (centres - np.float32(start)) / np.float32(end - start) * cells - np.float32(0.5)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(cells, dtype=np.float32)), 0)


def _enlargement(pixels: int, cells: int) -> np.ndarray:
    """The weight of each cell in each pixel of a bilinear enlargement: [pixels, cells], the border repeated."""
    place = (np.arange(pixels, dtype=np.float32) + np.float32(0.5)) * np.float32(cells / pixels) - np.float32(0.5)
    place = np.clip(place, 0, cells - 1)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(cells, dtype=np.float32)), 0)
