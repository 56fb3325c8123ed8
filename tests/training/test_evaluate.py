from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.training.evaluate import PreemptedError, evaluate
from halvit_jax.training.fault_tolerance.preemption import PreemptionHandler
from halvit_jax.training.sharding import make_mesh

VALUES = np.arange(21.0, dtype=np.float32)


class Batches:
    """21 examples in batches of 8, the last one padded with rows that must not count."""

    num_examples = 21
    steps_per_epoch = 3

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        for start in range(8 * start_step, 24, 8):
            rows = VALUES[start : start + 8]
            filling = 8 - len(rows)
            mask = np.arange(8) < len(rows)
            yield {"image": np.pad(rows, (0, filling), constant_values=1e6), "mask": mask, "unread": np.zeros(8)}


class Task:
    """A line through the images, whose collector knows the mean and the median of its values."""

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"image": jax.ShapeDtypeStruct((), "float32"), "mask": jax.ShapeDtypeStruct((), "bool")}

    def score(self, params: Any, model_state: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return params["w"] * batch["image"] + model_state["b"]

    def collector(self) -> "Values":
        return Values()


class Values:
    """The scores of the real rows."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def add(self, scored: np.ndarray, batch: dict[str, np.ndarray]) -> None:
        assert type(scored) is np.ndarray  # whole, on the host
        assert batch.keys() == {"mask"}
        self.values += list(scored[batch["mask"]])

    def result(self) -> dict[str, float | None]:
        return {"mean": float(np.mean(self.values)), "median": float(np.median(self.values)), "undefined": None}


VARIABLES = {"params": {"w": jnp.asarray(2.0)}, "model_state": {"b": jnp.asarray(1.0)}}


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_every_example_counts_exactly_once(sizes: dict[str, int]) -> None:
    scores = evaluate(Task(), VARIABLES, Batches(), make_mesh(**sizes), preemption=PreemptionHandler())
    expected = {"mean": 2.0 * VALUES.mean() + 1.0, "median": 2.0 * np.median(VALUES) + 1.0}
    assert scores == {name: pytest.approx(value) for name, value in expected.items()} | {"undefined": None}


@pytest.mark.parametrize("announced", [20, 22])
def test_a_wrong_number_of_examples_is_an_error(announced: int) -> None:
    loader = Batches()
    loader.num_examples = announced
    with pytest.raises(RuntimeError, match=f"scored 21 examples where the split holds {announced}"):
        evaluate(Task(), VARIABLES, loader, make_mesh(), preemption=PreemptionHandler())


def test_a_loader_without_batches_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batches, "batches", lambda self: iter(()))
    with pytest.raises(RuntimeError, match="scored 0 examples where the split holds 21"):
        evaluate(Task(), VARIABLES, Batches(), make_mesh(), preemption=PreemptionHandler())


def test_an_evaluation_sends_a_heartbeat_a_batch_and_is_preempted_one_batch_after_a_signal() -> None:
    preemption, moves = PreemptionHandler(), []

    def heartbeat() -> None:
        moves.append(len(moves))
        preemption.name = "SIGTERM"

    with pytest.raises(PreemptedError):
        evaluate(Task(), VARIABLES, Batches(), make_mesh(), preemption=preemption, heartbeat=heartbeat)
    assert moves == [0, 1]
