"""COCO's average precision, by pycocotools, which defines it; on the host only.

Ground truth and detections are dicts as in COCO's files. Every image of the ground truth counts, also one without
detections, on which what is missed would else not be missed.
"""

import contextlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from halvit_jax import storage
from halvit_jax.text import first_few, pip_install

KINDS = {"box": "bbox", "mask": "segm"}  # our name of a metric -> pycocotools's
STATS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar100": 8}  # of `summarize`
ANY_AREA, HUNDRED = 0, 2  # positions in pycocotools's tables: areas of all sizes, at most 100 detections
Detection = dict[str, Any]


def evaluate(
    truth: Mapping[str, Any], detections: Sequence[Detection], *, kind: str, backend: str = "pycocotools"
) -> dict[str, float | None]:
    """The metrics of detections: `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`, `ar100`, and `ap/<class>`.

    AP is the mean over IoU .5 to .95 and over classes, from at most 100 detections an image. None stands for a class or
    size of which there is no ground truth (pycocotools's -1).

    Args:
        truth: as `read_truth` reads it.
        detections: `image_id`, `category_id`, `score` and `bbox` (x, y, width, height) or `segmentation`. Where both
            are given, pycocotools takes a detection's area from its box, and so whether it is small or large.
        kind: "box" or "mask".
        backend: a key of BACKENDS.

    Raises:
        ValueError: an unknown image or category, or a backend that is unknown or not installed.
    """
    library = _library(backend)
    _refuse_unknown(truth, detections)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        expected, found = library.coco(), library.coco()
        expected.dataset = {**truth, "annotations": _objects(truth["annotations"], kind)}
        expected.createIndex()
        if detections:
            found = expected.loadRes([dict(detection) for detection in detections])
        else:
            found.dataset = {**truth, "annotations": []}
            found.createIndex()
        scorer = library.scorer(expected, found, KINDS[kind])
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    metrics = {name: _defined(scorer.stats[position]) for name, position in STATS.items()}
    names = {category["id"]: category["name"] for category in truth["categories"]}
    for position, number in enumerate(scorer.params.catIds):
        precision = scorer.eval["precision"][:, :, position, ANY_AREA, HUNDRED]
        known = precision[precision > -1]
        metrics[f"ap/{names[number]}"] = float(known.mean()) if known.size else None
    return metrics


def read_truth(path: str) -> dict[str, Any]:
    """The ground truth of an annotation file, with the fields that pycocotools needs in every annotation.

    `data.coco.read_index` has checked the file. Annotations are numbered anew from 1, because pycocotools takes a match
    with number 0 for none.
    """
    content = json.loads(storage.parse(path).read_text())
    annotations = []
    for number, entry in enumerate(content["annotations"], 1):
        _, _, width, height = entry["bbox"]
        kept = {name: entry[name] for name in ("image_id", "category_id", "bbox")}
        kept |= {"id": number, "iscrowd": int(entry.get("iscrowd", 0)), "area": entry.get("area", width * height)}
        shape = entry.get("segmentation")
        if isinstance(shape, list):
            shape = [part for part in shape if len(part) >= 6 and len(part) % 2 == 0]
        annotations.append({**kept, "segmentation": shape} if shape else kept)
    images = [{name: image[name] for name in ("id", "height", "width")} for image in content["images"]]
    categories = [{name: category[name] for name in ("id", "name")} for category in content["categories"]]
    return {"images": images, "annotations": annotations, "categories": categories}


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Masks, bool [n, h, w], as compressed RLE with text in it, which JSON can hold."""
    from pycocotools import mask

    found = mask.encode(np.asfortranarray(np.moveaxis(masks.astype(np.uint8), 0, -1)))
    return [{"size": [int(side) for side in one["size"]], "counts": one["counts"].decode()} for one in found]


class Library(NamedTuple):
    """The two classes of an implementation of COCO's metric."""

    coco: Callable[..., Any]
    scorer: Callable[..., Any]


def _pycocotools() -> Library:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return Library(COCO, COCOeval)


def _faster_coco_eval() -> Library:
    from faster_coco_eval import COCO, COCOeval_faster

    return Library(COCO, COCOeval_faster)


BACKENDS: dict[str, tuple[Callable[[], Library], str]] = {
    "pycocotools": (_pycocotools, pip_install("detection")),
    "faster_coco_eval": (_faster_coco_eval, pip_install("faster-coco-eval")),
}
"""Name -> (its classes, the command that installs it). The second is faster than the first, which is the reference."""


def check_backend(backend: str) -> None:
    """Raise a ValueError, with the command that installs it, for a backend that is unknown or missing."""
    _library(backend)


def _library(backend: str) -> Library:
    if backend not in BACKENDS:
        raise ValueError(f"detection.metric_backend={backend!r} is not one of {', '.join(BACKENDS)}")
    load, command = BACKENDS[backend]
    try:
        return load()
    except ImportError as error:
        raise ValueError(f"the metric of detection.metric_backend={backend!r} is not installed: {command}") from error


def _refuse_unknown(truth: Mapping[str, Any], detections: Sequence[Detection]) -> None:
    for field, entries in {"image_id": truth["images"], "category_id": truth["categories"]}.items():
        unknown = {detection[field] for detection in detections} - {entry["id"] for entry in entries}
        if unknown:
            numbers = [str(number) for number in sorted(unknown)]
            raise ValueError(f"detections have a {field} that the ground truth does not have: {first_few(numbers)}")


def _objects(annotations: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Copies of the annotations, in which pycocotools writes; for masks those that have one."""
    return [dict(entry) for entry in annotations if kind == "box" or "segmentation" in entry]


def _defined(value: float) -> float | None:
    return None if value < 0 or math.isnan(value) else float(value)
