from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.training.evaluate import PreemptedError, averages, evaluate, total
from halvit_jax.training.fault_tolerance.preemption import PreemptionHandler, requested
from halvit_jax.training.sharding import make_mesh

VALUES = np.arange(21.0, dtype=np.float32)


class Batches:
    """21 examples in batches of 8, the last one filled up with rows that must not count."""

    num_examples = 21
    steps_per_epoch = 3

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        for start in range(8 * start_step, 24, 8):
            rows = VALUES[start : start + 8]
            filling = 8 - len(rows)
            mask = np.arange(8) < len(rows)
            yield {"image": np.pad(rows, (0, filling), constant_values=1e6), "mask": mask}


@jax.jit
def _step(params: Any, model_state: Any, batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    values = params["w"] * batch["image"] + model_state["b"]
    sums = {"value": jnp.sum(jnp.where(batch["mask"], values, 0.0)), "examples": jnp.sum(batch["mask"])}
    return sums, requested(batch)


VARIABLES = {"params": {"w": jnp.asarray(2.0)}, "model_state": {"b": jnp.asarray(1.0)}}


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_every_example_counts_exactly_once(sizes: dict[str, int]) -> None:
    scores = evaluate(_step, VARIABLES, Batches(), make_mesh(**sizes), preemption=PreemptionHandler())
    assert scores == {"value": pytest.approx(2.0 * VALUES.mean() + 1.0)}


@pytest.mark.parametrize("announced", [20, 22])
def test_a_wrong_number_of_examples_is_an_error(announced: int) -> None:
    loader = Batches()
    loader.num_examples = announced
    with pytest.raises(RuntimeError, match=f"scored 21 examples where the split holds {announced}"):
        evaluate(_step, VARIABLES, loader, make_mesh(), preemption=PreemptionHandler())


def test_totals_are_exact_beyond_what_float32_can_count() -> None:
    parts = [{"a": jnp.asarray(2.0**24), "b": jnp.asarray(1.0)}, {"a": jnp.asarray(1.0), "b": jnp.asarray(2.0)}]
    totals = total(parts)
    assert {type(value) for value in totals.values()} == {float}
    assert totals == {"a": 2.0**24 + 1.0, "b": 3.0}


def test_averages_are_sums_over_examples_and_leave_their_number_out() -> None:
    assert averages({"loss": 6.0, "top1": 3.0, "examples": 4.0}) == {"loss": 1.5, "top1": 0.75}
    assert averages({"loss": 0.0, "examples": 0.0}) == {"loss": 0.0}


def test_a_loader_without_batches_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batches, "batches", lambda self: iter(()))
    with pytest.raises(RuntimeError, match="scored 0 examples where the split holds 21"):
        evaluate(_step, VARIABLES, Batches(), make_mesh(), preemption=PreemptionHandler())


def test_an_evaluation_moves_with_every_batch_and_stops_one_batch_after_a_signal() -> None:
    preemption, moves = PreemptionHandler(), []

    def heartbeat() -> None:
        moves.append(len(moves))
        preemption.name = "SIGTERM"

    with pytest.raises(PreemptedError):
        evaluate(_step, VARIABLES, Batches(), make_mesh(), preemption=preemption, heartbeat=heartbeat)
    assert moves == [0, 1]
