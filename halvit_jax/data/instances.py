"""From an image of a COCO file to a row of a batch: decoded, resized, flipped, with its boxes and cut-out masks.

A row of a batch of detection:

- `image` uint8 [h, w, 3] on the canvas, in its upper left corner; the rest is 0
- `size` int32 [2]: rows and columns that are image; `original` int32 [2]: those of the file; `image_id` int32
- `boxes` float32 [g, 4]: x1, y1, x2, y2 in pixels of the canvas; `label` int32 [g]; `real` bool [g]: the row is a box
- `crops` uint8 [g, 112, 112]: the part of each object's mask inside its box, 255 times the covered share of a cell
- `mask` bool: the row is an image and does not only fill the batch up

Shapes: `h w` canvas, `g` rows for objects, `r` side of a crop.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from halvit_jax.data import ops
from halvit_jax.data.canvases import Canvas, choose, scaled
from halvit_jax.data.coco import CocoIndex
from halvit_jax.protocols import DataError

CROP = 112  # r
Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Makes the rows of batches from an index and the folder of its images."""

    index: CocoIndex
    folder: str
    max_objects: int  # g
    masks: bool

    def make(self, image: int, canvas: Canvas, *, short_side: int, long_side: int, flip: bool) -> Row:
        """The row of an image of the index.

        Raises:
            DataError: the file is missing, is no image, or has another size than the index says.
        """
        pixels = self.read(image)
        size = scaled(self.index.sizes[image : image + 1], short_side, long_side)[0]
        return {
            "image": on_canvas(pixels, size, canvas, flip=flip),
            "size": size,
            "original": self.index.sizes[image],
            "image_id": np.int32(self.index.image_ids[image]),
            "mask": np.True_,
            **self._objects(image, size, flip),
        }

    def filling(self, canvas: Canvas) -> Row:
        """A row without an image, which only fills a batch up."""
        return {
            "image": np.zeros((*canvas, 3), np.uint8),
            "size": np.zeros(2, np.int32),
            "original": np.zeros(2, np.int32),
            "image_id": np.int32(0),
            "mask": np.False_,
            **self._no_objects(),
        }

    def path(self, image: int) -> str:
        """The path of an image's file."""
        return os.path.join(self.folder, self.index.names[image])

    def read(self, image: int) -> np.ndarray:
        """The decoded image, uint8 [rows, columns, 3].

        Raises:
            DataError: as in `make`.
        """
        path = self.path(image)
        try:
            pixels = ops.decode(tf.io.read_file(path)).numpy()
        except tf.errors.NotFoundError as error:
            raise DataError(f"{path}, which {self.index.file} lists, is missing") from error
        except tf.errors.OpError as error:
            raise DataError(f"{path} cannot be decoded: {ops.reason(error)}; replace it") from error
        listed = tuple(self.index.sizes[image].tolist())
        if pixels.shape[:2] != listed:
            swapped = pixels.shape[:2] == listed[::-1]
            why = "; its sides are swapped: an EXIF orientation, which is not applied here" if swapped else ""
            raise DataError(
                f"{path} has {pixels.shape[0]} rows and {pixels.shape[1]} columns, but {self.index.file} says "
                f"{listed[0]} and {listed[1]}{why}; correct one of them"
            )
        return pixels

    def _no_objects(self) -> Row:
        rows: dict[str, Any] = {
            "boxes": np.zeros((self.max_objects, 4), np.float32),
            "label": np.zeros(self.max_objects, np.int32),
            "real": np.zeros(self.max_objects, bool),
        }
        if self.masks:
            rows["crops"] = np.zeros((self.max_objects, CROP, CROP), np.uint8)
        return rows

    def _objects(self, image: int, size: np.ndarray, flip: bool) -> Row:
        rows = self._no_objects()
        own = self.index.objects(image)
        n = len(own)
        given = self.index.boxes[own.start : own.stop]
        height, width = size
        ratio = (size / self.index.sizes[image]).astype(np.float32)[::-1]  # of x and y
        limits = np.array([width, height] * 2, np.float32)
        boxes = np.minimum(given * np.tile(ratio, 2), limits)
        rows["boxes"][:n] = flipped(boxes, width) if flip else boxes
        rows["label"][:n] = self.index.labels[own.start : own.stop]
        rows["real"][:n] = True
        if self.masks:
            for row, number in enumerate(own):
                cut = crop(self.index.bitmap(image, number), self.index.boxes[number])
                rows["crops"][row] = cut[:, ::-1] if flip else cut
        return rows


def flipped(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes [n, 4] in the mirror image of this width."""
    x1, y1, x2, y2 = boxes.T
    return np.stack([width - x2, y1, width - x1, y2], 1)


def crop(bitmap: np.ndarray, box: np.ndarray, side: int = CROP) -> np.ndarray:
    """The part of a bitmap [rows, columns] inside a box (x1, y1, x2, y2), as cells: uint8 [side, side].

    A cell is 255 times the share of its area that the bitmap covers; pixel i covers [i, i + 1).
    """
    x1, y1, x2, y2 = (float(edge) for edge in box)
    top, bottom = int(np.floor(y1)), int(np.ceil(y2))
    left, right = int(np.floor(x1)), int(np.ceil(x2))
    down = _overlaps(y1 - top, y2 - top, bottom - top, side)
    across = _overlaps(x1 - left, x2 - left, right - left, side)
    covered = down @ bitmap[top:bottom, left:right].astype(np.float32) @ across.T
    return np.round(covered * 255).clip(0, 255).astype(np.uint8)


def _overlaps(start: float, end: float, pixels: int, cells: int) -> np.ndarray:
    """The share of each of `cells` equal parts of [start, end) in each pixel, float32 [cells, pixels]."""
    edges = np.linspace(start, end, cells + 1)
    pixel = np.arange(pixels)
    common = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (np.maximum(common, 0) / max((end - start) / cells, 1e-9)).astype(np.float32)


def read_on_canvas(path: str, canvases: Sequence[Canvas], *, short_side: int, long_side: int) -> Row:
    """An image of any file as in a batch: `image`, `size`, `original`, and `pixels`, the image of the file.

    Raises:
        ValueError: the file cannot be read, is not an image, or fits on no canvas.
    """
    try:
        pixels = ops.decode(tf.io.read_file(path)).numpy()
    except tf.errors.OpError as error:
        raise ValueError(f"{path} is not an image that can be read: {ops.reason(error)}") from error
    return put_on_canvas(pixels, canvases, short_side=short_side, long_side=long_side)


def put_on_canvas(pixels: np.ndarray, canvases: Sequence[Canvas], *, short_side: int, long_side: int) -> Row:
    """`read_on_canvas` of an image in memory, uint8 [rows, columns, 3] or grey [rows, columns].

    Raises:
        ValueError: an array of another shape or type, or an image that fits on no canvas.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (1, 3)):
        raise ValueError(f"an image must be uint8 [h, w, 3] or [h, w], not {pixels.dtype} {list(pixels.shape)}")
    pixels = np.broadcast_to(pixels if pixels.ndim == 3 else pixels[..., None], (*pixels.shape[:2], 3))
    original = np.array(pixels.shape[:2], np.int32)
    size = scaled(original[None], short_side, long_side)[0]
    canvas = canvases[int(choose(size[None], canvases)[0])]
    return {"image": on_canvas(pixels, size, canvas), "size": size, "original": original, "pixels": pixels}


def on_canvas(pixels: np.ndarray, size: np.ndarray, canvas: Canvas, *, flip: bool = False) -> np.ndarray:
    """An image resized to `size`, mirrored if it is to `flip`, in the upper left corner of a canvas."""
    if tuple(size) != pixels.shape[:2]:
        pixels = ops.resize(tf.constant(pixels), tuple(size), method="bilinear", antialias=False).numpy()
    image = np.zeros((*canvas, 3), np.uint8)
    image[: size[0], : size[1]] = pixels[:, ::-1] if flip else pixels
    return image
