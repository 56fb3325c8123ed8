"""The embedded data set of detection: scenes of handwritten digits, with a mask of every digit, in COCO's format.

The digits are those of `sources/digits.py`, in its split: train scenes have train digits, val scenes test digits. 1,000
and 200 images are drawn and written once, as PNGs and annotation files; nothing is downloaded. Image number n of a
split is a function of (split, n) alone.

Shapes: `h w` image.
"""

import functools
import json
import os
import tempfile
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from halvit_jax.data.outlines import segmentation, uncompressed
from halvit_jax.data.sources.digits import TEST_EVERY

NAME, VERSION = "digits_scenes", "1.0.0"
SPLITS = {"train": (1, 1000), "val": (2, 200)}  # split -> the first word of its seeds, number of images
ANNOTATIONS = {split: f"annotations/instances_{split}.json" for split in SPLITS}
IMAGES = {split: f"images/{split}" for split in SPLITS}
SIDES = (128, 144, 160, 176, 192)  # of images, height and width each
GRAIN = 0.03  # standard deviation of the ground's noise
EMPTY, CROWDED = 0.03, 0.1  # fractions of images without a digit, and with a crowd
FEWEST, MOST = 2, 8  # digits
SMALLEST, LARGEST = 16, 80  # height of a digit
CROWD_HEIGHT, CROWD_ROWS, CROWD_COLUMNS = 11, 3, 4
CONTRAST = 0.35  # of a digit's colour against the ground, in a channel
LEAST_PIXELS, LEAST_VISIBLE = 20, 0.4  # of a digit that is annotated


class Scene(NamedTuple):
    """An image, uint8 [h, w, 3], and its annotations, without their ids."""

    image: np.ndarray
    annotations: list[dict[str, Any]]


def prepare(data_dir: str) -> str:
    """The folder of the data set below `data_dir` ("": TFDS's own default); it is written where it is missing."""
    base = data_dir or os.environ.get("TFDS_DATA_DIR", os.path.expanduser("~/tensorflow_datasets"))
    folder = os.path.join(base, NAME, VERSION)
    if all(tf.io.gfile.exists(os.path.join(folder, file)) for file in ANNOTATIONS.values()):
        return folder
    with tempfile.TemporaryDirectory() as made:
        for split in SPLITS:
            _write_split(made, split)
        # Annotations last: where they are, all is. Another process may write the same bytes at the same time.
        for inside in (*IMAGES.values(), "annotations"):
            target = os.path.join(folder, inside)
            tf.io.gfile.makedirs(target)
            for name in sorted(os.listdir(os.path.join(made, inside))):
                _publish(os.path.join(made, inside, name), os.path.join(target, name))
    return folder


def _publish(source: str, target: str) -> None:
    """Copy a file so that it appears whole."""
    unfinished = f"{target}.{os.getpid()}.incomplete"
    tf.io.gfile.copy(source, unfinished, overwrite=True)
    tf.io.gfile.rename(unfinished, target, overwrite=True)


def scene(split: str, number: int) -> Scene:
    """Image `number` of a split and what is on it."""
    return _Painter(
        np.random.Generator(np.random.PCG64(np.random.SeedSequence([SPLITS[split][0], number]))), split
    ).paint()


def _write_split(folder: str, split: str) -> None:
    images, annotations = [], []
    os.makedirs(os.path.join(folder, IMAGES[split]))
    os.makedirs(os.path.join(folder, "annotations"), exist_ok=True)
    for number in range(SPLITS[split][1]):
        made = scene(split, number)
        height, width, _ = made.image.shape
        name = f"{number + 1:06d}.png"
        tf.io.write_file(os.path.join(folder, IMAGES[split], name), tf.io.encode_png(made.image))
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        for annotation in made.annotations:
            annotations.append({"id": len(annotations) + 1, "image_id": number + 1, **annotation})
    categories = [{"id": category(digit), "name": str(digit)} for digit in range(10)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    with open(os.path.join(folder, ANNOTATIONS[split]), "w") as file:
        json.dump(content, file)


def category(digit: int) -> int:
    """The category id of a digit: not contiguous, as COCO's are not."""
    return 2 * digit + 1


class _Painter:
    """Draws one scene; everything random comes from `rng`, in the order of the calls."""

    def __init__(self, rng: np.random.Generator, split: str) -> None:
        self._rng, self._split = rng, split
        self._canvas = np.zeros((0, 0, 3))
        self._layers: list[tuple[int, bool, np.ndarray]] = []  # digit, crowd, and its mask whatever covers it

    def paint(self) -> Scene:
        rng = self._rng
        self._ground(*(int(side) for side in rng.choice(SIDES, 2)))
        empty = rng.random() < EMPTY
        if rng.random() < CROWDED:
            self._crowd()
        for _ in range(0 if empty else rng.integers(FEWEST, MOST + 1)):
            self._digit()
        image = np.round(self._canvas.clip(0, 1) * 255).astype(np.uint8)
        return Scene(image, self._annotations())

    def _ground(self, height: int, width: int) -> None:
        """Two colours blended by a random field, grain, and up to three strokes that are no digits."""
        rng = self._rng
        colours = rng.random((2, 3))
        blend = enlarge(rng.random((4, 4)), height, width)[..., None]
        self._canvas = colours[0] * blend + colours[1] * (1 - blend) + rng.normal(0, GRAIN, (height, width, 3))
        for _ in range(rng.integers(4)):
            ends = rng.random((2, 2)) * (height, width)
            colour = rng.random(3)
            self._canvas[_stroke(ends, height, width)] = colour

    def _digit(self) -> None:
        rng = self._rng
        digit = int(rng.integers(10))
        tall = float(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST))))
        ink = self._ink(digit)
        wide = tall * (ink.shape[1] + 2) / (ink.shape[0] + 2) * float(np.exp(rng.uniform(-0.2, 0.2)))
        rows, columns = self._canvas.shape[:2]
        height, width = min(round(tall), rows), min(max(round(wide), 1), columns)
        top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        opacity = _opacity(ink, height, width)
        colour = self._colour(top, left, opacity)
        self._lay(digit, False, top, left, opacity, colour)

    def _crowd(self) -> None:
        """Twelve small digits of one class on a grid, one annotation together."""
        rng = self._rng
        digit, cell = int(rng.integers(10)), CROWD_HEIGHT + 1
        rows, columns = self._canvas.shape[:2]
        whole = np.zeros((CROWD_ROWS * cell, CROWD_COLUMNS * cell))
        for row in range(CROWD_ROWS):
            for column in range(CROWD_COLUMNS):
                ink = self._ink(digit)
                width = min(max(round(CROWD_HEIGHT * ink.shape[1] / ink.shape[0]), 1), CROWD_HEIGHT)
                part = whole[row * cell : row * cell + CROWD_HEIGHT, column * cell : column * cell + width]
                part[:] = _opacity(ink, CROWD_HEIGHT, width)
        top = int(rng.integers(rows - whole.shape[0] + 1))
        left = int(rng.integers(columns - whole.shape[1] + 1))
        self._lay(digit, True, top, left, whole, self._colour(top, left, whole))

    def _ink(self, digit: int) -> np.ndarray:
        """A random digit of a class, cut to its ink: [at most 8, at most 8] in [0, 1]."""
        images = _digits(self._split)[digit]
        return images[self._rng.integers(len(images))]

    def _colour(self, top: int, left: int, opacity: np.ndarray) -> np.ndarray:
        """A random colour that differs from the ground below."""
        below = self._canvas[top : top + opacity.shape[0], left : left + opacity.shape[1]]
        ground = below[opacity > 0.5].mean(0) if (opacity > 0.5).any() else below.mean((0, 1))
        while True:
            colour = self._rng.random(3)
            if np.abs(colour - ground).max() > CONTRAST:
                return colour

    def _lay(self, digit: int, crowd: bool, top: int, left: int, opacity: np.ndarray, colour: np.ndarray) -> None:
        where = np.s_[top : top + opacity.shape[0], left : left + opacity.shape[1]]
        shown = opacity[..., None]
        self._canvas[where] = self._canvas[where] * (1 - shown) + colour * shown
        mask = np.zeros(self._canvas.shape[:2], bool)
        mask[where] = opacity > 0.5
        self._layers.append((digit, crowd, mask))

    def _annotations(self) -> list[dict[str, Any]]:
        """Of every layer what no later one covers; a digit of which too little is left has none."""
        found, covered = [], np.zeros(self._canvas.shape[:2], bool)
        for digit, crowd, mask in reversed(self._layers):
            visible, pixels = mask & ~covered, mask.sum()
            covered |= mask
            least = 1 if crowd else max(LEAST_PIXELS, LEAST_VISIBLE * pixels)
            if visible.sum() >= least:
                found.append(_annotation(digit, crowd, visible))
        return found[::-1]


def _annotation(digit: int, crowd: bool, mask: np.ndarray) -> dict[str, Any]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    return {
        "category_id": category(digit),
        "bbox": [int(side) for side in box],
        "area": int(mask.sum()),
        "iscrowd": int(crowd),
        "segmentation": uncompressed(mask) if crowd else segmentation(mask),
    }


@functools.cache
def _digits(split: str) -> list[list[np.ndarray]]:
    """The digits of a split by class, each cut to its ink."""
    from sklearn.datasets import load_digits

    digits, seen = load_digits(), np.zeros(10, int)
    found: list[list[np.ndarray]] = [[] for _ in range(10)]
    for image, label in zip(digits.images / 16, digits.target, strict=True):
        for_test = seen[label] % TEST_EVERY == 0
        seen[label] += 1
        if for_test == (split == "val"):
            rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
            found[label].append(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return found


def _opacity(ink: np.ndarray, height: int, width: int) -> np.ndarray:
    return ((enlarge(np.pad(ink, 1), height, width) - 0.25) / 0.3).clip(0, 1)


def enlarge(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A bilinear resize with half-pixel centres and the border repeated: [rows, columns] -> [height, width].

    No product of matrices, whose rounding depends on the machine.
    """
    for axis, size in enumerate((height, width)):
        place = ((np.arange(size) + 0.5) * (image.shape[axis] / size) - 0.5).clip(0, image.shape[axis] - 1)
        first = np.minimum(place.astype(int), max(image.shape[axis] - 2, 0))
        share = np.expand_dims(place - first, 1 - axis)
        after = np.minimum(first + 1, image.shape[axis] - 1)
        image = image.take(first, axis) * (1 - share) + image.take(after, axis) * share
    return image


def _stroke(ends: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels within 1.5 of a line between two points (row, column): bool [h, w]."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    start, along = ends[0], ends[1] - ends[0]
    length = max((along**2).sum(), 1e-9)
    share = (((rows - start[0]) * along[0] + (columns - start[1]) * along[1]) / length).clip(0, 1)
    return (rows - start[0] - share * along[0]) ** 2 + (columns - start[1] - share * along[1]) ** 2 <= 1.5**2
