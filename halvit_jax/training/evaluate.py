"""Run a task over a finite loader; every example counts exactly once."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from halvit_jax.protocols import Array, Loader, PyTree
from halvit_jax.training.fault_tolerance.preemption import STOP, Signals
from halvit_jax.training.sharding import to_devices
from halvit_jax.training.step import EvalStep


class StoppedError(Exception):
    """All hosts have agreed to stop before the end of an evaluation."""


def evaluate(
    eval_step: EvalStep,
    variables: PyTree,
    loader: Loader,
    mesh: Mesh,
    *,
    signals: Signals,
    moved: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Averages over all examples of the loader, for variables {"params": ..., "model_state": ...}.

    `moved` is called after every batch.

    Raises:
        StoppedError: a host was asked to stop.
        RuntimeError: the masks of the batches do not sum to the number of examples the loader announced.
    """
    variables = (variables["params"], variables["model_state"])
    sums: list[dict[str, Array]] = []
    wish: Array = np.int32(0)
    for batch in loader.batches():
        before = wish
        new, wish = eval_step(*variables, to_devices(signals.stamp(batch), mesh))
        sums.append(new)
        if int(before) == STOP:  # the wish of the batch before, so that two batches are under way
            raise StoppedError
        moved()
    totals = total(sums) if sums else {"examples": 0.0}
    if round(totals["examples"]) != loader.num_examples:
        raise RuntimeError(f"scored {totals['examples']:.0f} examples where the split holds {loader.num_examples}")
    return averages(totals)


def total(sums: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Sums of many batches, still on the device -> one sum each, on the host."""
    fetched = jax.device_get(list(sums))
    return {name: sum(float(part[name]) for part in fetched) for name in fetched[0]}


def averages(totals: Mapping[str, float]) -> dict[str, float]:
    """Sums over examples -> means; the number of examples itself is left out."""
    examples = max(totals["examples"], 1.0)
    return {name: value / examples for name, value in totals.items() if name != "examples"}
