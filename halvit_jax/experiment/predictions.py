"""Predictions on a labelled split: a file of all of them, accuracy per class, and what is confused with what."""

import csv
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from halvit_jax.protocols import DatasetInfo, PyTree

COLUMNS = ("image", "label", "prediction", "probability", "probability_of_label")
MAX_CLASSES = 20  # listed, those with the lowest accuracy first
MAX_PAIRS = 10  # of confused classes


def write_predictions(file: pathlib.Path, task: Any, variables: PyTree, loader: Any, info: DatasetInfo) -> list[str]:
    """Write a CSV file with a line for each image, beside it FILE.confusion.csv, and return lines for people.

    `variables` are {"params": ..., **model_state}. The rows of the confusion matrix are labels, its
    columns predictions.

    Raises:
        ValueError: the task is no classification, several processes, or the file cannot be written.
    """
    if jax.process_count() > 1:
        raise ValueError(f"--predictions={file} is for one process")
    names = info.class_names
    confusion = np.zeros((len(names), len(names)), int)
    rows: list[Sequence[Any]] = []
    for _, name, label, own in predictions(task, variables, loader.batches(names=True)):
        if own.shape != (len(names),) or np.ndim(label):
            raise ValueError(f"--predictions={file} is for classification with one label an image")
        found = int(own.argmax())
        confusion[label, found] += 1
        shown = (names[label], names[found], round(float(own[found]), 6), round(float(own[label]), 6))
        rows.append((name, *shown))
    try:
        _write(file, [COLUMNS, *rows])
        _write(
            matrix := file.with_suffix(".confusion.csv"),
            [["", *names], *([n, *c] for n, c in zip(names, confusion, strict=True))],
        )
    except OSError as error:
        raise ValueError(f"--predictions={file} cannot be written: {error.strerror}") from error
    return [f"{len(rows)} predictions in {file}, the confusion matrix in {matrix}", *summary(confusion, names)]


def predictions(
    task: Any, variables: PyTree, batches: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[np.ndarray, str, Any, np.ndarray]]:
    """The image, its name, its label and the probabilities of all classes, for every row of some batches.

    `variables` are {"params": ..., **model_state} of the task's model. Batches have "image", "label", "name", "mask".
    """
    serving = task.serving(variables)
    apply = jax.jit(serving.apply)
    for batch in batches:
        probabilities = np.asarray(jax.nn.softmax(apply(serving.variables, batch["image"])))
        for row in np.flatnonzero(batch["mask"]):
            yield batch["image"][row], batch["name"][row].decode(), batch["label"][row], probabilities[row]


def summary(confusion: np.ndarray, names: Sequence[str]) -> list[str]:
    """Accuracy per class, the worst first, their mean, and the pairs that are confused most often."""
    counts, right = confusion.sum(1), confusion.diagonal()
    known = np.flatnonzero(counts)
    accuracies = right[known] / counts[known]
    worst = [known[i] for i in np.argsort(accuracies, kind="stable")]
    lines = [f"{right[i] / counts[i]:7.2%} of {counts[i]:,} {names[i]}" for i in worst[:MAX_CLASSES]]
    lines += [f"and {len(worst) - MAX_CLASSES} more classes"] if len(worst) > MAX_CLASSES else []
    lines.append(f"{accuracies.mean():7.2%} balanced accuracy, the mean over {len(known)} classes")
    pairs = Counter({(i, j): int(n) for (i, j), n in np.ndenumerate(confusion) if i != j and n})
    return lines + [f"{n} times {names[i]} was taken for {names[j]}" for (i, j), n in pairs.most_common(MAX_PAIRS)]


def _write(file: pathlib.Path, rows: Sequence[Sequence[Any]]) -> None:
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows(rows)
