"""The words every room shares: what a batch, a loader and a task are."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

BAD_INPUT, BROKEN_RUN, STUCK, STOPPED = 2, 3, 70, 75
"""Exit codes, which `door` explains."""

Array = Any  # a jax or NumPy array; this file imports neither framework
PyTree = Any
Batch = Mapping[str, Array]
"""`image` uint8 [b, h, w, 3]; `label` int32 [b]; `mask` bool [b], False where a row only fills up the batch."""


class DataError(ValueError):
    """The data are not what they should be; the message says which file and what to do."""


class DatasetInfo(NamedTuple):
    """What a task has to know of a data set."""

    class_names: list[str]
    num_examples: int
    name: str = ""
    extra: Mapping[str, Any] = {}
    """What only some data sets have, such as the category numbers of an annotation file."""


class Loader(Protocol):
    """Where batches come from. A host sees its own rows of each global batch."""

    num_examples: int
    steps_per_epoch: int

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The batches from global step `start_step` on: endless in training, one pass in evaluation."""
        ...


class Loss(NamedTuple):
    """What `Task.loss` returns: the scalar to minimise, the new model state, and sums for the report."""

    value: Array
    model_state: PyTree
    sums: dict[str, Array]


class Task(Protocol):
    """What is learned. Pure functions over plain nested dicts; the trainer knows nothing else of a model."""

    frozen: PyTree
    """Arrays the loss reads that are neither trained nor saved, such as a teacher."""

    partition_rules: tuple[tuple[str, tuple[tuple[str, ...] | str | None, ...]], ...]
    """(regex of a parameter path, mesh axis or axes of each dimension), first match wins."""

    headline: str
    """The score of an evaluation by which the best checkpoint is chosen; more is better."""

    def init(self, key: Array) -> tuple[PyTree, PyTree]:
        """Fresh (params, model_state)."""
        ...

    def loss(self, params: PyTree, model_state: PyTree, frozen: PyTree, batch: Batch, key: Array) -> Loss:
        """The training loss of one batch."""
        ...

    def predict(self, params: PyTree, model_state: PyTree, batch: Batch) -> PyTree:
        """The model's outputs on one batch, in inference."""
        ...

    def score(self, outputs: PyTree, batch: Batch) -> dict[str, Array]:
        """Sums over the real examples of one batch, among them `examples`; averages are sums / examples."""
        ...

    def summary_images(self, batch: Batch) -> dict[str, Array]:
        """Images worth looking at, as the model gets them in training: name -> [n, h, w, 3] in [0, 1]."""
        ...
