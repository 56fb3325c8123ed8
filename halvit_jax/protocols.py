"""The shared vocabulary: batch, loader, task, collector, serving model, and exit codes."""

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Array = Any  # a jax or NumPy array; this file imports neither framework
ArraySpec = Any  # a jax.ShapeDtypeStruct
PyTree = Any
Batch = Mapping[str, Array]
"""Arrays whose first axis is the example; `mask` bool [b] is False where a row only pads the batch."""


class ExitCode(enum.IntEnum):
    """Exit codes of all commands."""

    DONE = 0
    PARTLY = 1  # done in part, or a negative answer (`check`: corrupt, `plan`: does not fit), or an uncaught error
    BAD_INPUT = 2  # flags, config, files or data that the user can correct
    FATAL_RUN = 3  # the run cannot continue: values are not finite, or no checkpoint can be written
    STALLED = 70  # no progress, or other processes were lost; the same command resumes
    PREEMPTED = 75  # stopped by a signal after a checkpoint was saved; the same command resumes


class DataError(ValueError):
    """Bad data; the message names the file and the remedy."""


class DatasetInfo(NamedTuple):
    """Facts about a data set; a copy lies in the workdir for the commands that read no data."""

    class_names: list[str]
    num_examples: int
    name: str = ""
    extra: Mapping[str, Any] = {}  # plain JSON values that only some data sets have, such as category numbers


class Loader(Protocol):
    """Source of batches. A host sees its own rows of each global batch."""

    num_examples: int
    steps_per_epoch: int
    info: DatasetInfo  # of the data set that it reads

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The batches from global step `start_step` on: endless in training, one pass in evaluation."""
        ...


class Loss(NamedTuple):
    """Result of `Task.loss`: the scalar to minimise, the new model state, and sums for the report."""

    value: Array
    model_state: PyTree
    sums: dict[str, Array]  # over examples; `examples` is their number


class Collector(Protocol):
    """Turns the scores of all batches of an evaluation into metrics, on the host."""

    reads: Sequence[str]
    """Names of `batch_spec` that `add` reads: nothing else of a batch is gathered to the host."""

    def add(self, scored: PyTree, batch: Batch) -> None:
        """Add `Task.score` of one global batch, and what `reads` names of that batch."""
        ...

    def result(self) -> dict[str, float | None]:
        """The metrics by name; None where one is undefined."""
        ...


class Task(Protocol):
    """A learning problem as pure functions over nested dicts: all that training uses of a model."""

    constants: PyTree
    """Arrays that the loss reads but that are not trained or saved, such as a teacher."""

    partition_rules: Sequence[tuple[str, tuple[Any, ...]]]
    """(regex of a parameter path, mesh axis or axes of each dimension), first match wins; see `trees.Rules`."""

    transfer_rules: Sequence[tuple[str, str]]
    """(regex of a parameter path, how loaded weights may differ there), first match wins; see `convert.transfer`."""

    primary_metric: str
    """The metric that chooses the best checkpoint; more is better."""

    progress_metrics: tuple[str, ...]
    """Names in `Loss.sums` that the progress line shows."""

    units: Mapping[str, str]
    """Metric -> unit. A metric with the unit "%" is a fraction, shown in percent."""

    def batch_spec(self) -> dict[str, ArraySpec]:
        """Shape and dtype of one example under each name that the task reads from a batch."""
        ...

    def init(self, key: Array) -> tuple[PyTree, PyTree]:
        """Initial (params, model_state)."""
        ...

    def loss(self, params: PyTree, model_state: PyTree, constants: PyTree, batch: Batch, key: Array) -> Loss:
        """The training loss of one batch."""
        ...

    def score(self, params: PyTree, model_state: PyTree, batch: Batch) -> PyTree:
        """Arrays that an evaluation keeps of one batch: sums, or one row an example."""
        ...

    def collector(self, info: DatasetInfo) -> Collector:
        """A new collector for one evaluation, on the data set of `info`."""
        ...

    def summary_images(self, batch: Batch) -> dict[str, Array]:
        """Images as the model gets them in training: name -> [n, h, w, 3] in [0, 1]."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)  # hashable and weakly referable, as jax.jit requires
class ServingModel:
    """A trained model for inference: uint8 images [b, h, w, c] -> outputs, with normalisation inside."""

    apply: Callable[..., PyTree]  # (variables, images) -> outputs; after the images what else `inputs` names
    variables: PyTree
    input_size: tuple[int, int]  # height and width of the images
    capture: Callable[[PyTree, Array], Mapping[str, Mapping[str, Array]]] | None = None
    """(variables, images) -> {kind: {layer: array}} of the intermediates, where the model sows them."""
    inputs: tuple[str, ...] = ("image",)  # what it reads of a batch, in this order
    channels: int = 3  # of the images

    def __call__(self, *inputs: Array) -> PyTree:
        """The outputs."""
        return self.apply(self.variables, *inputs)


class Servable(Protocol):
    """Methods that predict, export, bench and check need in addition to `Task`.

    A task may also have `check_records(records, info) -> (summary, warning)`, which `check` calls with the undecoded
    records of a small training split.
    """

    def check_dataset(self, info: DatasetInfo) -> None:
        """Refuse a data set that does not fit the task.

        Raises:
            ValueError: with the config field to change.
        """
        ...

    def serving(self, variables: PyTree, *, folded: bool = True) -> ServingModel:
        """The model with the trained variables {"params": ..., **model_state}, by default in its fastest form."""
        ...

    def decode(self, outputs: PyTree, info: DatasetInfo) -> list[dict[str, Any]]:
        """The outputs of a batch as one JSON object an image."""
        ...
