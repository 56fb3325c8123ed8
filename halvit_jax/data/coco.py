"""An annotation file in COCO's JSON as an index of images and objects: arrays, not dicts.

What training and evaluation ask of a file is checked once, while it is read. What cannot be meant is an error. What
COCO's tools leave out of the ground truth is left out here too, and counted by its reason.

Shapes: `i` images, `o` objects, `h w` an image.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from halvit_jax.data import coco_file, rle, segments
from halvit_jax.data.segments import Segments

CROWD, OUTSIDE, NO_AREA, NO_SIDE = "crowd", "outside its image", "of no area", "with a side below 1 pixel"
NO_MASK = "without a mask"
CLIPPED = "boxes that leave their image, clipped"
AREA_OF_BOX = "annotations without an area, that of the box taken"
SMALL, MEDIUM = 32**2, 96**2  # areas below which COCO calls an object small or medium


@dataclasses.dataclass(frozen=True)
class CocoIndex:
    """The images of a file in its order, and their objects that are ground truth, grouped by image."""

    file: str
    names: list[str]  # file names of the images
    image_ids: np.ndarray  # int64 [i]
    sizes: np.ndarray  # int32 [i, 2]: height and width
    starts: np.ndarray  # int64 [i + 1]: the objects of image n are those from starts[n] to starts[n + 1]
    boxes: np.ndarray  # float32 [o, 4]: x1, y1, x2, y2, clipped to the image
    labels: np.ndarray  # int32 [o]: position of the category among the sorted ids
    areas: np.ndarray  # float32 [o], of the file
    category_ids: tuple[int, ...]  # sorted
    class_names: tuple[str, ...]  # of the sorted ids
    dropped: dict[str, int]  # reason -> annotations that are not ground truth
    notes: dict[str, int]  # what was put right -> how often
    segments: Segments | None = None  # of the objects; None: not asked for

    def count(self) -> np.ndarray:
        """The number of objects on each image, int64 [i]."""
        return np.diff(self.starts)

    def objects(self, image: int) -> range:
        """The objects of an image."""
        return range(int(self.starts[image]), int(self.starts[image + 1]))

    def bitmap(self, image: int, number: int) -> np.ndarray:
        """The mask of an object of this image, uint8 [h, w]; empty where the index holds no segmentations."""
        height, width = self.sizes[image].tolist()
        if self.segments is None:
            return np.zeros((height, width), np.uint8)
        return self.segments.draw(number, height, width)


def read_index(path: str, *, field: str, masks: bool = True) -> CocoIndex:
    """The index of an annotation file; `field` is the config field that names it, for messages.

    `masks`: also keep the segmentations, and count an object without one as no ground truth.

    Raises:
        ValueError: no file in COCO's JSON, no images, or content that cannot be meant: ids twice or unknown, numbers
            that are not finite, boxes as (x1, y1, x2, y2), a broken RLE.
    """
    rle.coco_masks()  # evaluation needs it even for boxes
    try:
        return _index(path, masks, **coco_file.load(path))
    except ValueError as error:
        raise ValueError(f"{field}={path!r}: {error}") from error


def _index(path: str, masks: bool, *, images: list, annotations: list, categories: list) -> CocoIndex:
    image_ids, names, sizes = coco_file.read_images(images)
    category_ids, class_names = coco_file.read_categories(categories)
    coco_file.read_ids(annotations, "annotation")
    of_image = coco_file.read_positions(annotations, "image_id", image_ids, "images")
    labels = coco_file.read_positions(annotations, "category_id", np.array(category_ids), "categories")
    given = coco_file.read_boxes(annotations)
    areas = coco_file.read_areas(annotations, given)
    crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in annotations], bool)
    limits = sizes[of_image][:, ::-1].astype(np.float64)  # width, height
    coco_file.refuse_corners(given[~crowd], limits[~crowd])
    corners = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], 1)
    clipped = np.clip(corners, 0, np.tile(limits, 2))
    over = (np.abs(clipped - corners) > coco_file.OVERHANG).any(1)
    # The order of reasons is that of mmdetection's checks; an annotation is counted for the first one.
    reasons = {
        CROWD: crowd,
        OUTSIDE: (clipped[:, 2:] <= clipped[:, :2]).any(1) & (given[:, 2:] > 0).all(1),
        NO_AREA: (areas <= 0) | (given[:, 2:] <= 0).any(1),
        NO_SIDE: (given[:, 2:] < 1).any(1),
    }
    keep, dropped = np.ones(len(annotations), bool), Counter()
    for reason, found in reasons.items():
        dropped[reason] = int((found & keep).sum())
        keep &= ~found
    notes = Counter({CLIPPED: int((over & keep).sum()), AREA_OF_BOX: sum("area" not in entry for entry in annotations)})
    order = np.argsort(of_image, kind="stable")
    order = order[keep[order]]
    packed = None
    if masks:
        packed, there = segments.pack(segments.read(annotations[n], *sizes[of_image[n]].tolist(), notes) for n in order)
        dropped[NO_MASK] = int((~there).sum())
        if len(order) and not there.any():
            raise ValueError("no object has a segmentation; set instances.masks=False to train on boxes alone")
        order = order[there]
    starts = np.concatenate([[0], np.cumsum(np.bincount(of_image[order], minlength=len(image_ids)))])
    return CocoIndex(
        file=path,
        names=names,
        image_ids=image_ids,
        sizes=sizes,
        starts=starts,
        boxes=clipped[order].astype(np.float32),
        labels=labels[order].astype(np.int32),
        areas=areas[order].astype(np.float32),
        category_ids=category_ids,
        class_names=class_names,
        dropped={reason: count for reason, count in dropped.items() if count},
        notes={note: count for note, count in notes.items() if count},
        segments=packed,
    )


def describe(index: CocoIndex, used: Sequence[int] | np.ndarray) -> list[str]:
    """Lines about a file: images, objects, the most on one image, what was left out or put right, sizes, classes."""
    counts = index.count()
    sizes = np.digitize(index.areas, [SMALL, MEDIUM])
    small, medium, large = (int((sizes == n).sum()) for n in range(3))
    lines = [
        f"{index.file}: {len(index.names):,} images, {len(used):,} of them used; {len(index.labels):,} objects, at "
        f"most {counts.max(initial=0)} on an image, {(counts == 0).sum():,} images without any",
        f"areas: {small:,} small, {medium:,} medium, {large:,} large; crowds: {index.dropped.get(CROWD, 0):,}",
    ]
    left_out = [f"{count:,} {reason}" for reason, count in index.dropped.items() if reason != CROWD]
    put_right = [f"{count:,} {note}" for note, count in index.notes.items()]
    lines.append(f"no ground truth: {', '.join(left_out) or 'none'}" + "".join(f"; {note}" for note in put_right))
    per_class = np.bincount(index.labels, minlength=len(index.class_names))
    lines.append(
        f"objects a class: {', '.join(f'{n} {c:,}' for n, c in zip(index.class_names, per_class, strict=True))}"
    )
    return lines
