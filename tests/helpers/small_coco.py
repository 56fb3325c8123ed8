"""Small sets in COCO's format: a dict to be written as an annotation file, and images to go with it."""

import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

SIZES = ((40, 60), (60, 40), (50, 50), (40, 64), (64, 40), (33, 40), (40, 60))  # height, width of the images
CATEGORIES = {7: "cat", 3: "dog", 90: "bird"}


def content(images: int = len(SIZES)) -> dict[str, list[dict[str, Any]]]:
    """`images` images; image n has n % 3 boxes as polygons, the first an uncompressed RLE and a crowd."""
    listed = [
        {"id": 100 + n, "file_name": f"{n}.png", "height": SIZES[n % 7][0], "width": SIZES[n % 7][1]}
        for n in range(images)
    ]
    annotations: list[dict[str, Any]] = []
    for n in range(images):
        for k in range(n % 3):
            annotations.append(box(100 + n, [4 + k, 5, 20, 10 + k], category=(7, 3, 90)[(n + k) % 3]))
    height, width = SIZES[0]
    runs = {"size": [height, width], "counts": [height * 10 + 2, 12, height * (width - 10) - 14]}
    annotations.append(box(100, [10, 2, 1, 12], segmentation=runs))
    annotations.append(box(100, [0, 0, 40, 30], segmentation=runs, iscrowd=1))
    for number, annotation in enumerate(annotations):
        annotation["id"] = number + 1
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    return {"images": listed, "annotations": annotations, "categories": categories}


def box(image: int, bbox: list[float], category: int = 7, **fields: Any) -> dict[str, Any]:
    """An annotation whose mask is its box, unless `fields` say something else."""
    x, y, w, h = bbox
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    entry = {"image_id": image, "category_id": category, "bbox": bbox, "area": w * h, "segmentation": [polygon]}
    return {"id": 1000, **entry, "iscrowd": 0, **fields}


def write(root: pathlib.Path, train: dict[str, Any], evaluation: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write both annotation files and random images below `root`; the fields of config.instances that name them."""
    for split, listed in (("train", train), ("eval", evaluation or train)):
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / f"{split}.json").write_text(json.dumps(listed))
        rng = np.random.default_rng(0)
        for image in listed["images"]:
            pixels = rng.integers(0, 256, (image["height"], image["width"], 3), np.uint8)
            Image.fromarray(pixels).save(root / split / image["file_name"])
    return {
        "root": str(root),
        "train_annotations": "train.json",
        "eval_annotations": "eval.json",
        "train_images": "train",
        "eval_images": "eval",
    }
