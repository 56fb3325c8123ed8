"""The content of an annotation file in COCO's JSON, checked: what cannot be meant is an error of one line.

Shapes: `i` images, `o` annotations.
"""

import json
from typing import Any

import numpy as np
import tensorflow as tf

from halvit_jax.text import first_few

LISTS = ("images", "annotations", "categories")
OVERHANG = 1.0  # pixels by which a box may leave its image before it is counted
SUSPICIOUS = 0.1  # fraction of boxes that leave their images, from which (x1, y1, x2, y2) is suspected
INT32 = np.iinfo(np.int32)


def load(path: str) -> dict[str, list]:
    """The lists `images`, `annotations` and `categories` of a file; others are left out.

    Raises:
        ValueError: as all functions here do, with what is wrong and where, but without the name of the file.
    """
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            content = json.loads(file.read())
    except tf.errors.OpError as error:
        raise ValueError("no such file, or it cannot be read; name the annotation file in COCO's JSON") from error
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from error
    missing = [name for name in LISTS if not (isinstance(content, dict) and isinstance(content.get(name), list))]
    if missing:
        raise ValueError(f"no COCO file, which has the lists {', '.join(LISTS)}; this one lacks {', '.join(missing)}")
    for name in ("images", "categories"):
        if not content[name]:
            raise ValueError(f"0 {name}; there is nothing to learn from it")
    return {name: content[name] for name in LISTS}


def read_images(images: list[Any]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Ids int64 [i], file names, and sizes (height, width) int32 [i, 2]."""
    ids = read_ids(images, "image")
    if ids.max() > INT32.max or ids.min() < INT32.min:
        raise ValueError(f"the image id {ids[np.abs(ids).argmax()]} does not fit into 32 bits")
    for image in images:
        for name in ("height", "width"):
            if not _is_whole(image.get(name)) or image[name] < 1:
                raise ValueError(
                    f"image {image['id']} has {name}={image.get(name)!r}, which must be a whole number from 1 on"
                )
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise ValueError(f"image {image['id']} has no file_name")
    sizes = np.array([[image["height"], image["width"]] for image in images], np.int32)
    return ids, [image["file_name"] for image in images], sizes


def read_categories(categories: list[Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Sorted ids, and the name of each."""
    ids = read_ids(categories, "category")
    names = [category.get("name") for category in categories]
    unnamed = [str(number) for number, name in zip(ids, names, strict=True) if not isinstance(name, str)]
    if unnamed:
        raise ValueError(f"category {first_few(unnamed)} has no name")
    order = np.argsort(ids)
    return tuple(int(n) for n in ids[order]), tuple(names[n] for n in order)


def read_ids(entries: list[Any], kind: str) -> np.ndarray:
    """The ids of all entries, int64 [n], each once."""
    for number, entry in enumerate(entries):
        given = entry.get("id") if isinstance(entry, dict) else None
        if not _is_whole(given):
            raise ValueError(f"{kind} number {number} has id={given!r}, which must be a whole number")
    ids = np.array([entry["id"] for entry in entries], np.int64)
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{kind} ids that are there more than once: {first_few([str(n) for n in values[counts > 1]])}")
    return ids


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_positions(annotations: list[Any], key: str, known: np.ndarray, where: str) -> np.ndarray:
    """Position of each annotation's image or category, int64 [o]; of a category among the sorted ids."""
    for entry in annotations:
        if not _is_whole(entry.get(key)):
            raise ValueError(f"annotation {entry['id']} has {key}={entry.get(key)!r}, which must be a whole number")
    given = np.array([entry[key] for entry in annotations], np.int64)
    unknown = ~np.isin(given, known)
    if unknown.any():
        values = [str(n) for n in np.unique(given[unknown])]
        raise ValueError(f"{unknown.sum():,} annotations have a {key} that {where} does not list: {first_few(values)}")
    order = np.argsort(known)
    return order[np.searchsorted(known, given, sorter=order)]


def read_boxes(annotations: list[Any]) -> np.ndarray:
    """x, y, width and height of all annotations, float64 [o, 4]."""
    for entry in annotations:
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
            raise ValueError(f"annotation {entry['id']} has bbox={box!r}, which must be 4 numbers: x, y, width, height")
    boxes = np.array([entry["bbox"] for entry in annotations], np.float64).reshape(-1, 4)
    broken = ~np.isfinite(boxes).all(1)
    if broken.any():
        numbers = [str(annotations[n]["id"]) for n in np.flatnonzero(broken)]
        raise ValueError(f"a bbox that is not finite: annotation {first_few(numbers)}")
    return boxes


def read_areas(annotations: list[Any], boxes: np.ndarray) -> np.ndarray:
    """The area of all annotations, float64 [o]; where a file gives none, that of the box."""
    of_boxes = (boxes[:, 2] * boxes[:, 3]).tolist()
    areas = np.array([entry.get("area", of_box) for entry, of_box in zip(annotations, of_boxes, strict=True)])
    if areas.dtype.kind not in "iuf" or not np.isfinite(areas).all():
        number = next(e["id"] for e in annotations if not np.isfinite(_number(e.get("area", 0))))
        raise ValueError(f"annotation {number} has an area that is no finite number")
    return areas.astype(np.float64)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def refuse_corners(boxes: np.ndarray, limits: np.ndarray) -> None:
    """Refuse a file whose boxes are (x1, y1, x2, y2).

    Read as COCO's (x, y, width, height) many of them would leave their images, while as corners all fit.
    """
    if not len(boxes):
        return
    leaving = (boxes[:, :2] + boxes[:, 2:] > limits + OVERHANG).any(1).sum()
    as_corners = (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= limits + OVERHANG)
    if as_corners.all() and leaving > SUSPICIOUS * len(boxes):
        raise ValueError(
            f"{leaving:,} of {len(boxes):,} boxes leave their images as COCO's (x, y, width, height), and all fit as "
            "(x1, y1, x2, y2); write width and height"
        )
