"""What `check` says about the data of detection before the first compile, and the reading of all images."""

import concurrent.futures
from typing import NamedTuple

import numpy as np

from halvit_jax.data.coco import CocoIndex
from halvit_jax.data.instance_loaders import THREADS, EvalInstances, TrainInstances
from halvit_jax.data.pipeline import Loaders
from halvit_jax.protocols import DataError
from halvit_jax.text import first_few


class InstanceReport(NamedTuple):
    """Lines for a reader, and warnings on one line, "" if there are none."""

    lines: list[str]
    warning: str


def check_instances(loaders: Loaders, most: int) -> InstanceReport:
    """Describe both annotation files, and decode their images, of more than `most` as many at equal distances.

    Raises:
        DataError: images that cannot be read, or have another size than their file says; the first few are named.
    """
    sets: dict[str, TrainInstances | EvalInstances] = {"train": loaders.train, **loaders.evals}
    lines, warnings = [], []
    for name, loader in sets.items():
        lines += [f"{name}: {line}" for line in loader.describe()]
        index = loader.rows.index
        without = _classes_without_objects(index)
        if without:
            warnings.append(f"{name}: {len(without)} classes have no object: {first_few(without)}")
        if name == "train" and loader.never_used:
            warnings.append(f"{loader.never_used:,} images are never used: their canvas has fewer than a batch")
        lines.append(f"{name}: {_read(loader, most)}")
    return InstanceReport(lines, "; ".join(warnings))


def _classes_without_objects(index: CocoIndex) -> list[str]:
    counts = np.bincount(index.labels, minlength=len(index.class_names))
    return [name for name, count in zip(index.class_names, counts, strict=True) if not count]


def _read(loader: TrainInstances | EvalInstances, most: int) -> str:
    used = loader.used if len(loader.used) <= most else loader.used[:: -(-len(loader.used) // most)]

    def failure(image: int) -> str:
        try:
            loader.rows.read(image)
        except DataError as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        failures = [line for line in pool.map(failure, used.tolist()) if line]
    if failures:
        rest = f"; and {len(failures) - 1:,} more" if len(failures) > 1 else ""
        raise DataError(f"{len(failures):,} of {len(used):,} images cannot be used: {failures[0]}{rest}")
    return f"{len(used):,} images were read and have the size that the file says"
