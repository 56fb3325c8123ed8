"""The loaders of detection: annotation files and images to batches of several canvases.

A batch is a function of (seed, step): see `canvases`. Images are decoded by threads, some batches ahead.
"""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from halvit_jax import storage
from halvit_jax.data import coco, scenes
from halvit_jax.data.canvases import Canvas, EvalPlan, Slot, TrainPlan, choose, scaled
from halvit_jax.data.coco import CocoIndex
from halvit_jax.data.instances import Row, Rows
from halvit_jax.data.pipeline import ONLY_HOST, Host, Loaders
from halvit_jax.protocols import DataError, DatasetInfo
from halvit_jax.text import first_few

COCO = "coco"
NAMES = (COCO, scenes.NAME)
MIN_SIDE = 32  # images with a shorter side are not trained on, as in mmdetection
THREADS = min(os.cpu_count() or 1, 16)
AHEAD = 2  # batches that are being made while one is in use
TFDS_COCO = (
    "the coco/2017 of TFDS has no segmentation, no category ids and integer areas, so it can neither train nor score "
    "masks; get the official files ready with `bash launch/prepare_coco.sh SOURCE DATA` and set instances.name='coco'"
)


def make_detection_loaders(
    *,
    name: str,
    root: str,
    data_dir: str,
    train_annotations: str,
    eval_annotations: str,
    train_images: str,
    eval_images: str,
    canvases: Sequence[Canvas],
    short_side: int,
    long_side: int,
    train_short_sides: Sequence[int],
    flip: bool,
    max_objects: int,
    keep_empty: bool,
    masks: bool,
    batch_size: int,
    seed: int,
    host: Host = ONLY_HOST,
    training: bool = True,
) -> Loaders:
    """The loaders of `config.instances`, whose fields explain the keywords.

    Without `training` no training data are needed.

    Raises:
        ValueError: a value that is not allowed, files that are not there, or content that cannot be meant.
    """
    storage.check_scheme(root, "instances.root=")
    storage.check_scheme(data_dir, "instances.data_dir=")
    if name == "coco/2017" or name.startswith("coco/"):
        raise ValueError(f"instances.name={name!r}: {TFDS_COCO}")
    if name not in NAMES:
        raise ValueError(f"instances.name={name!r} is not one of {', '.join(NAMES)}")
    for field, value in {"short_side": short_side, "long_side": long_side}.items():
        if value < 0:
            raise ValueError(f"instances.{field}={value} must not be negative")
    if max_objects < 1:
        raise ValueError(f"instances.max_objects={max_objects} must be at least 1")
    if batch_size % host.count:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {host.count} hosts")
    if name == scenes.NAME:
        root = scenes.prepare(data_dir)
        train_annotations, eval_annotations = scenes.ANNOTATIONS["train"], scenes.ANNOTATIONS["val"]
        train_images, eval_images = scenes.IMAGES["train"], scenes.IMAGES["val"]
    elif not root:
        raise ValueError("instances.name='coco' needs instances.root, the folder that holds annotations and images")
    files = {"train": (train_annotations, train_images), "eval": (eval_annotations, eval_images)}
    rows = {}
    for split in ("train", "eval") if training else ("eval",):
        annotations, images = files[split]
        path, field = os.path.join(root, annotations), f"instances.{split}_annotations"
        index = coco.read_index(path, field=field, masks=masks)
        _check_counts(index, max_objects)
        rows[split] = Rows(index, os.path.join(root, images), max_objects, masks)
        _check_files(rows[split], f"instances.{split}_images")
    shapes = tuple((int(height), int(width)) for height, width in canvases)
    sides = {"canvases": shapes, "long_side": long_side, "batch_size": batch_size, "host": host}
    evaluation = EvalInstances(rows["eval"], short_side=short_side, **sides)
    index = rows["eval"].index
    extra = {"category_ids": list(index.category_ids), "eval_annotations": index.file}
    info = DatasetInfo(list(index.class_names), evaluation.num_examples, name, extra)
    evaluation.info = info
    if not training:
        return Loaders(None, {"eval": evaluation}, info)
    _check_classes(rows["train"].index, index)
    train = TrainInstances(
        rows["train"],
        short_sides=tuple(train_short_sides) or (short_side,),
        keep_empty=keep_empty,
        flip=flip,
        seed=seed,
        **sides,
    )
    train.info = info._replace(num_examples=train.num_examples)
    return Loaders(train, {"eval": evaluation}, train.info)


class TrainInstances:
    """Endless batches; the heads of this module and of `canvases` say what they are a function of.

    Without `keep_empty` images without ground truth are left out, and always those with a side below 32 pixels.
    `short_sides`: one of them is drawn for each image, whose canvas is that of the largest.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        canvases: Sequence[Canvas],
        short_sides: Sequence[int],
        long_side: int,
        keep_empty: bool,
        flip: bool,
        batch_size: int,
        seed: int,
        host: Host = ONLY_HOST,
    ) -> None:
        index = rows.index
        self.left_out = {
            f"with a side below {MIN_SIDE} pixels": index.sizes.min(1) < MIN_SIDE,
            "without ground truth": (index.count() == 0) & (not keep_empty),
        }
        used = np.flatnonzero(~np.any(list(self.left_out.values()), axis=0))
        if not len(used):
            reasons = {reason: int(found.sum()) for reason, found in self.left_out.items()} | index.dropped
            counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
            raise ValueError(
                f"{index.file} has no image to train on; of its {len(index.names):,} images and their objects were "
                f"left out: {counts}"
            )
        self.rows, self.used, self._flip, self._host = rows, used, flip, host
        self._short_sides, self._long_side = short_sides, long_side
        chosen = choose(scaled(index.sizes[used], max(short_sides), long_side), canvases)
        self._plan = TrainPlan(canvases, chosen, used, batch_size=batch_size, seed=seed)
        self.num_examples, self.steps_per_epoch = len(used), self._plan.steps_per_epoch
        self.never_used = self._plan.never_used  # images in a canvas that has fewer than a batch

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This host's rows of the batches from `start_step` on, without end."""
        return _batches(self._slots(start_step), self._row)

    def describe(self) -> list[str]:
        """Lines about the annotation file and about what is not trained on."""
        lines = coco.describe(self.rows.index, self.used)
        reasons = {reason: int(found.sum()) for reason, found in self.left_out.items()}
        reasons["in a canvas with fewer images than a batch"] = self.never_used
        found = [f"{count:,} {reason}" for reason, count in reasons.items() if count]
        return [*lines, f"images not trained on: {', '.join(found) or 'none'}"]

    def _slots(self, start_step: int) -> Iterator[Slot]:
        for slot in self._plan.slots(start_step):
            yield slot.rows(*self._host)

    def _row(self, slot: Slot, row: int) -> Row:
        flip, size = slot.draws[row]
        short_side = self._short_sides[int(size * len(self._short_sides))]
        return self.rows.make(
            int(slot.images[row]),
            slot.canvas,
            short_side=short_side,
            long_side=self._long_side,
            flip=self._flip and flip < 0.5,
        )


class EvalInstances:
    """One pass over all images, whatever is on them, each once on any number of hosts."""

    def __init__(
        self,
        rows: Rows,
        *,
        canvases: Sequence[Canvas],
        short_side: int,
        long_side: int,
        batch_size: int,
        host: Host = ONLY_HOST,
    ) -> None:
        self.rows, self.used, self._host = rows, np.arange(len(rows.index.names)), host
        self._short_side, self._long_side = short_side, long_side
        chosen = choose(scaled(rows.index.sizes, short_side, long_side), canvases)
        self._plan = EvalPlan(canvases, chosen, batch_size=batch_size)
        self.num_examples, self.steps_per_epoch = len(self.used), self._plan.steps_per_epoch

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This host's rows of the batches from number `start_step` on."""
        return _batches((slot.rows(*self._host) for slot in self._plan.slots(start_step)), self._row)

    def describe(self) -> list[str]:
        """Lines about the annotation file."""
        return coco.describe(self.rows.index, self.used)

    def _row(self, slot: Slot, row: int) -> Row:
        if not slot.mask[row]:
            return self.rows.filling(slot.canvas)
        sides = {"short_side": self._short_side, "long_side": self._long_side}
        return self.rows.make(int(slot.images[row]), slot.canvas, **sides, flip=False)


def _batches(slots: Iterator[Slot], make: Callable[[Slot, int], Row]) -> Iterator[dict[str, np.ndarray]]:
    """Batches in order, their rows made by threads."""
    with concurrent.futures.ThreadPoolExecutor(THREADS, "instances") as pool:
        pending: collections.deque[list[concurrent.futures.Future]] = collections.deque()
        try:
            for slot in slots:
                pending.append([pool.submit(make, slot, row) for row in range(len(slot.images))])
                if len(pending) > AHEAD:
                    yield _stack(pending.popleft())
            while pending:
                yield _stack(pending.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _stack(futures: list[concurrent.futures.Future]) -> dict[str, np.ndarray]:
    rows = [future.result() for future in futures]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _check_counts(index: CocoIndex, max_objects: int) -> None:
    counts = index.count()
    if counts.max(initial=0) > max_objects:
        over = np.flatnonzero(counts > max_objects)
        raise ValueError(
            f"instances.max_objects={max_objects} is less than the {counts.max()} objects on image "
            f"{index.image_ids[counts.argmax()]} of {index.file}, and {len(over):,} images have more; raise it to "
            f"{counts.max()}"
        )


def _check_files(rows: Rows, field: str) -> None:
    """Refuse a folder in which listed images are missing. Folders are listed, which is fast on a bucket too."""
    there: dict[str, set[str]] = {}
    missing = []
    for name in rows.index.names:
        folder, file = os.path.split(os.path.join(rows.folder, name))
        if folder not in there:
            there[folder] = _files(folder)
        if file not in there[folder]:
            missing.append(name)
    if missing:
        raise DataError(
            f"{field}: {rows.folder} lacks {len(missing):,} of the {len(rows.index.names):,} images that "
            f"{rows.index.file} lists: {first_few(missing)}"
        )


def _files(folder: str) -> set[str]:
    try:
        return set(tf.io.gfile.listdir(folder))
    except tf.errors.OpError:
        return set()


def _check_classes(train: CocoIndex, evaluation: CocoIndex) -> None:
    ours, theirs = (dict(zip(index.category_ids, index.class_names, strict=True)) for index in (train, evaluation))
    differing: list[Any] = sorted(set(ours.items()) ^ set(theirs.items()))
    if differing:
        found = first_few([f"{number} {name}" for number, name in differing])
        raise ValueError(
            f"instances.train_annotations={train.file!r} and instances.eval_annotations={evaluation.file!r} must have "
            f"the same categories; only one of them has {found}"
        )
