import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.processes import Started

from halvit_jax.training.evaluate import PreemptedError, evaluate
from halvit_jax.training.fault_tolerance.preemption import PreemptionHandler
from halvit_jax.training.sharding import make_mesh

VALUES = np.arange(21.0, dtype=np.float32)


class Batches:
    """21 examples in batches of 8, the last one padded with rows that must not count."""

    num_examples = 21
    steps_per_epoch = 3
    info = None

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

    def collector(self, info: Any) -> "Values":
        return Values()


class Values:
    """The scores of the real rows."""

    reads = ("mask",)

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


TWO_PROCESSES = """
import sys

import jax
import numpy as np
rank, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
from halvit_jax.training.evaluate import evaluate
from halvit_jax.training.fault_tolerance.preemption import PreemptionHandler
from halvit_jax.training.sharding import make_mesh

class Rows:
    "Each process has its half of 13 examples: batches of 4 rows a process, the last of them padded."
    num_examples, steps_per_epoch, info = 13, 2, None
    def batches(self, start_step=0):
        for step in range(2):
            rows = 8 * step + 4 * rank + np.arange(4)
            yield {"value": rows.astype(np.float32), "mask": rows < 13}

class Task:
    def batch_spec(self):
        one = jax.ShapeDtypeStruct
        return {"value": one((), "float32"), "mask": one((), "bool")}
    def score(self, params, model_state, batch):
        return {"doubled": 2 * batch["value"]}
    def collector(self, info):
        return Doubled()

class Doubled:
    reads = ("mask",)
    def __init__(self):
        self.rows = []
    def add(self, scored, batch):
        assert len(scored["doubled"]) == len(batch["mask"]) == 8, "rows of one process only"
        np.testing.assert_array_equal(scored["doubled"], 2 * batch["value"])
        self.rows += scored["doubled"][batch["mask"]].tolist()
    def result(self):
        return {"median": float(np.median(self.rows)), "rows": len(self.rows)}

found = evaluate(Task(), {"params": {}, "model_state": {}}, Rows(), make_mesh(), preemption=PreemptionHandler())
print(found)
"""


@pytest.mark.slow  # two processes of their own
def test_the_collectors_of_two_processes_see_all_rows_of_a_sharded_score(tmp_path: pathlib.Path) -> None:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    logs = [tmp_path / f"{rank}.txt" for rank in (0, 1)]
    processes = [
        Started("evaluate", str(rank), port, stdout=log, program=TWO_PROCESSES) for rank, log in enumerate(logs)
    ]
    codes = [process.wait(120) for process in processes]
    assert codes == [0, 0], [log.read_text() for log in logs]
    assert all(log.read_text().splitlines()[-1] == "{'median': 12.0, 'rows': 13}" for log in logs)
