"""Run a task over a finite loader; every example counts exactly once."""

from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import Mesh

from halvit_jax.protocols import Array, Loader, PyTree
from halvit_jax.training.sharding import to_devices


def evaluate(eval_step: Callable, variables: PyTree, loader: Loader, mesh: Mesh) -> dict[str, float]:
    """Averages over all examples of the loader, for variables {"params": ..., "model_state": ...}.

    Raises:
        RuntimeError: the masks of the batches do not sum to the number of examples the loader announced.
    """
    variables = (variables["params"], variables["model_state"])
    sums = [eval_step(*variables, to_devices(batch, mesh)) for batch in loader.batches()]
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
