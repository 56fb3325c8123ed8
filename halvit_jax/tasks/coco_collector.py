"""From the detections of batches to COCO's metrics, on the host.

Every host draws the masks of its own rows of each global batch; the results are gathered once, at the end.

Shapes: `b` images, `d` detections of an image, `r` side of a mask.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from halvit_jax.detection import coco_metric
from halvit_jax.detection.paste import paste
from halvit_jax.protocols import Array, Batch

# A detection's area is that of what is scored, as in mmdetection and detectron2, so the other one is left out.
OTHER = {"box": "segmentation", "mask": "bbox"}
Paste = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]


class CocoCollector:
    """Collector of detections; `result` has `box_ap`, `mask_ap` and the others of `coco_metric.evaluate`.

    Args:
        annotations: the annotation file of the evaluation set, or its ground truth.
        category_ids: the category of each label.
        masks: also score masks.
        backend: a key of `coco_metric.BACKENDS`.
        paste: how masks are drawn into their image.
        gather: the bytes of this process -> those of all processes, in order.

    After `result`, `detections` holds those of all hosts in the form of COCO's result files.

    Raises:
        ValueError: the backend is unknown or not installed.
    """

    reads = ("size", "original", "image_id", "mask")

    def __init__(
        self,
        annotations: str | Mapping[str, Any],
        category_ids: Sequence[int],
        *,
        masks: bool,
        backend: str = "pycocotools",
        paste: Paste = paste,
        gather: Callable[[bytes], list[bytes]] | None = None,
    ) -> None:
        coco_metric.check_backend(backend)
        self._annotations, self._category_ids = annotations, tuple(category_ids)
        self._kinds = ("box", "mask") if masks else ("box",)
        self._backend, self._paste, self._gather = backend, paste, gather or gather_bytes
        self._own: list[coco_metric.Detection] = []
        self.detections: list[coco_metric.Detection] = []

    def add(self, scored: Mapping[str, Array], batch: Batch) -> None:
        """Add the detections of a global batch, of which this process takes its own rows.

        `scored`: `boxes` [b, d, 4] in pixels of the canvas, `scores`, `labels`, `valid` [b, d], and with masks their
        probabilities `masks` [b, d, r, r]. `batch`: what `reads` names.
        """
        rows = len(batch["mask"]) // jax.process_count()
        first = jax.process_index() * rows
        for row in range(first, first + rows):
            if batch["mask"][row]:
                one = {name: np.asarray(scored[name][row]) for name in self._fields()}
                self._own += self._detections(one, *(batch[name][row] for name in ("image_id", "size", "original")))

    def result(self) -> dict[str, float | None]:
        """The metrics over all images of the ground truth, the same on every process."""
        parts = self._gather(json.dumps(self._own).encode())
        self.detections = [detection for part in parts for detection in json.loads(part)]
        metrics = self._score() if jax.process_index() == 0 else {}
        return json.loads(self._gather(json.dumps(metrics).encode())[0])

    def _score(self) -> dict[str, float | None]:
        truth = self._annotations
        if isinstance(truth, str):
            truth = coco_metric.read_truth(truth)
        metrics: dict[str, float | None] = {}
        for kind in self._kinds:
            found = coco_metric.evaluate(
                truth, _without(OTHER[kind], self.detections), kind=kind, backend=self._backend
            )
            metrics |= {f"{kind}_{name}": value for name, value in found.items()}
        return metrics

    def _fields(self) -> tuple[str, ...]:
        return ("boxes", "scores", "labels", "valid", *(("masks",) if "mask" in self._kinds else ()))

    def _detections(
        self, one: Mapping[str, np.ndarray], image_id: int, size: np.ndarray, original: np.ndarray
    ) -> list[coco_metric.Detection]:
        """Those of one image, in pixels of its file."""
        valid = one["valid"].astype(bool)
        ratio = np.asarray(original, np.float64) / np.asarray(size)  # of rows and columns
        boxes = one["boxes"][valid] * np.tile(ratio[::-1], 2)
        found = []
        for box, score, label in zip(boxes, one["scores"][valid], one["labels"][valid], strict=True):
            x1, y1, x2, y2 = (float(side) for side in box)
            found.append(
                {
                    "image_id": int(image_id),
                    "category_id": self._category_ids[int(label)],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": float(score),
                }
            )
        if "mask" in self._kinds and found:
            height, width = (int(side) for side in original)
            for detection, mask, box in zip(found, one["masks"][valid], boxes, strict=True):  # one bitmap at a time
                drawn = self._paste(mask[None], box[None], height, width)
                (detection["segmentation"],) = coco_metric.encode_masks(drawn)
        return found


def _without(field: str, detections: Sequence[coco_metric.Detection]) -> list[coco_metric.Detection]:
    return [{name: value for name, value in detection.items() if name != field} for detection in detections]


def gather_bytes(own: bytes) -> list[bytes]:
    """The bytes of every process, in their order, on all of them."""
    if jax.process_count() == 1:
        return [own]
    from jax.experimental import multihost_utils

    lengths = multihost_utils.process_allgather(np.array([len(own)], np.int64)).ravel()
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    parts = multihost_utils.process_allgather(padded)
    return [bytes(part[:length]) for part, length in zip(parts, lengths, strict=True)]
