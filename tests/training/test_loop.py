"""The real loop on a tiny model: what is not finite, sudden gradients, preemption, saves that fail."""

import functools
import itertools
import json
import os
import pathlib
import signal
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiers import tiered

from halvit_jax.config import default_config
from halvit_jax.protocols import DataError, Loss
from halvit_jax.tasks.metrics import MeanCollector
from halvit_jax.training import loop
from halvit_jax.training.checkpoint import checkpointer, manifest
from halvit_jax.training.checkpoint.checkpointer import Checkpointer, SaveError
from halvit_jax.training.checkpoint.manifest import CorruptCheckpointError
from halvit_jax.training.fault_tolerance.grad_spikes import OFF, GradSpikeGuard, SpikesError
from halvit_jax.training.fault_tolerance.nonfinite import NotFiniteError
from halvit_jax.training.fault_tolerance.preemption import PreemptionHandler
from halvit_jax.training.fault_tolerance.watchdog import Watchdog
from halvit_jax.training.optim import make_optimizer
from halvit_jax.training.report import Report
from halvit_jax.training.sharding import make_mesh
from halvit_jax.training.state import abstract_state, init_state

BATCH = 8


@jax.custom_vjp
def _zero(x: jax.Array, spoil: jax.Array) -> jax.Array:
    """Zero, whose gradient is NaN where `spoil`."""
    return jnp.zeros(())


_zero.defvjp(
    lambda x, spoil: (jnp.zeros(()), (x, spoil)),
    lambda kept, slope: (jnp.where(kept[1], jnp.nan, jnp.zeros_like(kept[0])), None),
)


class Regression:
    """Linear regression with a running mean; its batches may ask for trouble."""

    partition_rules = (("", ()),)
    constants: ClassVar[Any] = {}
    primary_metric = "score"

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = {"x": ((3,), "float32"), "y": ((), "float32"), "trouble": ((), "int32"), "mask": ((), "bool")}
        return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        return {"a": jnp.ones(3), "w": jax.random.normal(key, (3,))}, {"mean": jnp.zeros(3)}

    def loss(self, params: Any, model_state: Any, constants: Any, batch: Any, key: jax.Array) -> Loss:
        x = batch["x"] + 0.01 * jax.random.normal(key, batch["x"].shape)
        trouble = batch["trouble"][0]
        error = x @ params["w"] + params["a"].sum() - batch["y"]
        value = jnp.mean(error**2) * jnp.where(trouble == 3, 100.0, 1.0) * jnp.where(trouble == 5, 1e20, 1.0)
        value = value + jnp.where(trouble == 1, jnp.nan, 0.0)
        value = value + _zero(params["a"], trouble == 2)
        mean = 0.9 * model_state["mean"] + 0.1 * x.mean(0) + jnp.where(trouble == 4, jnp.inf, 0.0)
        sums = {"loss": value * BATCH, "examples": jnp.sum(batch["mask"])}
        return Loss(value, {"mean": mean}, sums)

    def score(self, params: Any, model_state: Any, batch: Any) -> dict[str, jax.Array]:
        outputs = batch["x"] @ params["w"]
        return {"score": -jnp.sum((outputs - batch["y"]) ** 2), "examples": jnp.sum(batch["mask"])}

    def collector(self, info: Any) -> MeanCollector:
        return MeanCollector()

    def summary_images(self, batch: Any) -> dict[str, jax.Array]:
        return {"x": jnp.zeros((1, 4, 4, 3))}


TROUBLE = {"loss": 1, "gradient": 2, "spike": 3, "statistics": 4, "overflow": 5}


class Batches:
    """Random batches that are a function of the step; `trouble` is {step: what}; `then` is called before a step."""

    num_examples = 2 * BATCH
    steps_per_epoch = 10**6
    info = None

    def __init__(self, trouble: dict[int, str] | None = None, then: dict[int, Any] | None = None) -> None:
        self._trouble, self._then = trouble or {}, then or {}

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        for step in itertools.count(start_step):
            self._then.get(step, lambda: None)()
            rng = np.random.default_rng(step)
            x = rng.standard_normal((BATCH, 3)).astype(np.float32)
            if self._trouble.get(step) == "input":
                x[3, 1] = np.nan
            trouble = np.full(BATCH, TROUBLE.get(self._trouble.get(step, ""), 0), np.int32)
            yield {"x": x, "y": x.sum(1), "trouble": trouble, "mask": np.ones(BATCH, bool)}


class Evaluation(Batches):
    """Two batches."""

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        return itertools.islice(super().batches(start_step), 2)


def run(
    workdir: pathlib.Path,
    *,
    train: Batches,
    evaluation: Batches | None = None,
    steps: int = 12,
    guard: GradSpikeGuard = OFF,
    change: Any = lambda state: state,
    attempts: int = 1,
    logged: list[str] | None = None,
    restart_if_corrupt: bool = False,
    every: int = 4,
    early_stopping: int = 0,
) -> dict[str, Any]:
    """The loop over `steps` steps, an evaluation and a checkpoint `every` 4; what is logged is appended to `logged`."""
    task, mesh = Regression(), make_mesh(devices=jax.devices()[:1])
    fields = default_config().optim.to_dict() | {"scaling": "none", "warmup_epochs": 0.0, "schedule": "constant"}
    optimizer = make_optimizer(**fields | {"learning_rate": 1e-2}, batch_size=8, steps_per_epoch=1, total_steps=100)
    report = Report(workdir, total_steps=steps, batch_size=BATCH)
    logged = [] if logged is None else logged
    report.log = logged.append
    checkpointer = Checkpointer(workdir, attempts=attempts, log=logged.append)
    abstract = abstract_state(task, optimizer, mesh=mesh, use_ema=True, guard=guard)
    fresh = functools.partial(init_state, task, optimizer, seed=0, use_ema=True, guard=guard)
    preemption = PreemptionHandler()
    try:
        start = loop.restore_or_init(
            checkpointer, report, abstract, fresh, eval_every=every, restart_if_corrupt=restart_if_corrupt
        )
        with preemption.install():
            return loop.train(
                task,
                optimizer,
                start._replace(state=change(start.state)),
                train,
                {"eval": evaluation or Evaluation()},
                mesh=mesh,
                checkpointer=checkpointer,
                report=report,
                preemption=preemption,
                watchdog=Watchdog(workdir, timeout=600.0, compile_timeout=600.0),
                debug_folder=workdir / "debug",
                seed=0,
                total_steps=steps,
                log_every=4,
                eval_every=every,
                checkpoint_every=every,
                ema_decay=0.9,
                early_stopping=early_stopping,
                guard=guard,
            )
    finally:
        checkpointer.close()
        report.close()


def _steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "images_per_s": None}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the unbroken run of 12 steps."""
    return _plain(run(tmp_path_factory.mktemp("whole"), train=Batches()))


def test_the_transfer_guard_refuses_a_batch_that_is_not_sharded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch on the host would be copied to the device by every step, unseen."""
    monkeypatch.setattr(loop, "to_devices", lambda rows, mesh: rows)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        run(tmp_path, train=Batches())


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("input", "loss, gradient/a, gradient/w"),
        ("loss", "loss"),
        ("gradient", "gradient/a"),
        ("statistics", "model_state/mean"),
    ],
)
@pytest.mark.parametrize("step", tiered([0, 6, 7, 11], {7}))
def test_a_nan_ends_the_run_at_most_two_steps_later(
    what: str, named: str, step: int, tmp_path: pathlib.Path, whole: dict[str, Any]
) -> None:
    fetched: list[int] = []
    counting = {i: functools.partial(fetched.append, i) for i in range(12)}
    with pytest.raises(NotFiniteError, match=f"^not finite at step {step}: {named}") as error:
        run(tmp_path, train=Batches({step: what}, counting))
    assert fetched[-1] <= step + 2
    assert _steps(tmp_path) == [s for s in (4, 8) if s <= step]
    bundle = tmp_path / "debug" / f"step_{step}"
    assert str(bundle) in str(error.value)
    metadata = json.loads((bundle / "report.json").read_text())
    assert metadata["step"] == step
    with np.load(bundle / f"batch_{step}_0.npz") as batch:
        assert batch["trouble"][0] == TROUBLE.get(what, 0)
        assert batch["x"].shape == (BATCH, 3)
    # The checkpoints before it are good: without the trouble the run goes on from there and ends as ever.
    assert _plain(run(tmp_path, train=Batches())) == whole


def test_a_nan_moment_is_found_within_ten_steps(tmp_path: pathlib.Path) -> None:
    """The square of a finite gradient overflows: no loss shows it, the parameter merely stands still."""
    fetched: list[int] = []
    counting = {i: functools.partial(fetched.append, i) for i in range(24)}
    with pytest.raises(NotFiniteError, match=r"^not finite at step 8: opt_state/"):
        run(tmp_path, train=Batches({1: "overflow"}, counting), steps=24, every=12)
    assert fetched[-1] <= 1 + 10


def test_a_nan_moment_is_found_before_a_checkpoint_is_saved(tmp_path: pathlib.Path) -> None:
    with pytest.raises(NotFiniteError, match=r"^not finite at step 3: opt_state/"):
        run(tmp_path, train=Batches({1: "overflow"}))
    assert _steps(tmp_path) == []


@pytest.mark.parametrize("holder", ["params", "opt_state", "ema"])
def test_a_nan_state_is_found_in_the_first_step(holder: str, tmp_path: pathlib.Path) -> None:
    def spoil(state: Any) -> Any:
        tree = jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, getattr(state, holder))
        return state.replace(**{holder: tree})

    with pytest.raises(NotFiniteError, match=r"^not finite at step 0: "):
        run(tmp_path, train=Batches(), change=spoil)
    assert _steps(tmp_path) == []


def test_a_gradient_spike_is_skipped_and_the_run_resumes_through_it_bit_for_bit(tmp_path: pathlib.Path) -> None:
    guard, trouble = GradSpikeGuard(10.0, max_skipped=3, window=100), {5: "spike", 7: "gradient"}
    logged: list[str] = []
    whole = _plain(run(tmp_path / "whole", train=Batches(trouble), guard=guard, logged=logged))
    clean = run(tmp_path / "clean", train=Batches(), guard=guard)
    assert whole["params_sha256"] != clean["params_sha256"]
    for stop in (4, 8):
        workdir = tmp_path / str(stop)
        run(workdir, train=Batches(trouble), guard=guard, steps=stop)
        assert _plain(run(workdir, train=Batches(trouble), guard=guard)) == whole
    # Left out means: as if the step had not been, but for its number.
    states = [run(tmp_path / f"s{n}", train=Batches(trouble), guard=guard, steps=n)["params_sha256"] for n in (5, 6, 8)]
    assert states[0] == states[1]
    assert states[2] != states[1]


def test_more_than_the_allowed_gradient_spikes_end_the_run(tmp_path: pathlib.Path) -> None:
    trouble = dict.fromkeys((5, 6, 7), "gradient")
    with pytest.raises(SpikesError, match=r"skip_updates.max_skipped=2 .* skip_updates.window=9 at step 7"):
        run(tmp_path, train=Batches(trouble), guard=GradSpikeGuard(10.0, max_skipped=2, window=9))
    assert _steps(tmp_path) == [4]


@pytest.mark.parametrize("step", tiered([0, 1, 5, 7, 10], {7}))
def test_a_sigterm_saves_at_the_current_step_and_the_resumed_run_ends_the_same(
    step: int, tmp_path: pathlib.Path, whole: dict[str, Any]
) -> None:
    terminate = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    stopped = run(tmp_path, train=Batches(then={step: terminate}))
    assert stopped["stopped"] == "SIGTERM"
    assert step <= stopped["step"] <= step + 2
    assert _steps(tmp_path)[-1] == stopped["step"]
    assert _plain(run(tmp_path, train=Batches())) == whole


def test_a_preempted_evaluation_is_repeated_on_resume(tmp_path: pathlib.Path, whole: dict[str, Any]) -> None:
    """A6 of the test plan: the curves have no gap at step 8."""
    terminate = functools.partial(os.kill, os.getpid(), signal.SIGINT)
    evaluations = iter([Evaluation(), Evaluation(), Evaluation(then={0: terminate})])  # raw and averaged of step 4

    class Turn(Evaluation):
        def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
            return next(evaluations).batches(start_step)

    assert run(tmp_path, train=Batches(), evaluation=Turn()) == {"step": 8, "stopped": "SIGINT"}
    seen: list[int] = []

    class Seen(Evaluation):
        def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
            seen.append(1)
            return super().batches(start_step)

    assert _plain(run(tmp_path, train=Batches(), evaluation=Seen())) == whole
    assert len(seen) == 4  # raw and averaged of steps 8 and 12


def test_a_failed_checkpoint_is_saved_at_the_next_step(
    tmp_path: pathlib.Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls, logged = manifest.write, [], []

    def write(folder: pathlib.Path, step: int) -> None:
        calls.append(step)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        original(folder, step)

    monkeypatch.setattr(checkpointer.manifest, "write", write)
    slow = {step: functools.partial(_until, lambda: bool(calls)) for step in (4, 5)}
    assert _plain(run(tmp_path, train=Batches(then=slow), attempts=2, logged=logged)) == whole
    assert calls[0] == 4
    assert calls[1] in (5, 6, 7)
    assert any("step 4 could not be written" in line and "attempt 1 of 2" in line for line in logged)


def test_checkpoints_that_keep_failing_end_the_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: pathlib.Path, step: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointer.manifest, "write", write)
    with pytest.raises(SaveError, match=r"No space left on device.*given up after 2 of save.attempts=2"):
        run(tmp_path, train=Batches(), attempts=2)


def test_a_corrupt_checkpoint_is_skipped_and_quarantined(tmp_path: pathlib.Path, whole: dict[str, Any]) -> None:
    run(tmp_path, train=Batches(), steps=8)
    files = [path for path in (tmp_path / "checkpoints" / "8").rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    logged: list[str] = []
    assert _plain(run(tmp_path, train=Batches(), logged=logged)) == whole
    assert f"WARNING: the checkpoint of step 8 is corrupt: {file}" in logged[0]
    assert logged[1] == "resuming from the checkpoint of step 4"
    assert [path.name for path in (tmp_path / "corrupt").iterdir()] == ["8"]


def test_if_all_checkpoints_are_corrupt_it_starts_over_only_when_told_to(
    tmp_path: pathlib.Path, whole: dict[str, Any]
) -> None:
    run(tmp_path, train=Batches(), steps=8)
    for step in (4, 8):
        (tmp_path / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_text("{")
    with pytest.raises(
        CorruptCheckpointError, match=r"no checkpoint is good: .*step 8.*step 4.*with --restart_if_corrupt"
    ):
        run(tmp_path, train=Batches())
    assert _plain(run(tmp_path, train=Batches(), restart_if_corrupt=True)) == whole


def _until(condition: Any) -> None:
    import time

    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.05)


def raising(error: Exception) -> Any:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("place", ["training", "evaluation"])
def test_an_error_in_the_data_ends_the_run_after_a_save(place: str, tmp_path: pathlib.Path) -> None:
    """Training: at step 6, between two checkpoints. Evaluation: before the checkpoint of its step."""
    bad = {6 if place == "training" else 1: raising(DataError("7.jpg cannot be decoded"))}
    batches = {
        "training": {"train": Batches(then=bad)},
        "evaluation": {"train": Batches(), "evaluation": Evaluation({}, bad)},
    }
    step = {"training": 6, "evaluation": 4}[place]
    with pytest.raises(DataError, match=f"7.jpg cannot be decoded; saved at step {step}"):
        run(tmp_path, **batches[place])
    assert (tmp_path / "checkpoints" / str(step) / "manifest.json").exists()
    whole = run(tmp_path.with_name("whole"), train=Batches())
    resumed = run(tmp_path, train=Batches())
    assert resumed["params_sha256"] == whole["params_sha256"]


def test_an_error_in_the_first_batch_saves_nothing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"^7.jpg cannot be decoded$"):
        run(tmp_path, train=Batches(then={0: raising(DataError("7.jpg cannot be decoded"))}))
    assert not (tmp_path / "checkpoints" / "0").exists()


class Worse(Evaluation):
    """An evaluation whose score falls from the second time on."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        self.times += 1
        for batch in super().batches(start_step):
            yield {**batch, "y": batch["y"] + 100.0 * self.times}


def test_early_stopping_ends_the_run_and_it_stays_ended(tmp_path: pathlib.Path) -> None:
    logged: list[str] = []
    result = run(tmp_path, train=Batches(), evaluation=Worse(), steps=100, early_stopping=2, logged=logged)
    assert result["step"] == 12  # the first evaluation, at step 4, was the best
    assert "early stopping: no better score in 2 evaluations" in logged
    again = run(tmp_path, train=Batches(), evaluation=Worse(), steps=100, early_stopping=2, logged=logged)
    assert again["step"] == 12
    assert again["params_sha256"] == result["params_sha256"]
    assert "finished: the newest checkpoint is of step 12 of 100; evaluating it" in logged


def test_early_stopping_counts_over_a_resumption(tmp_path: pathlib.Path) -> None:
    evaluation = Worse()
    run(tmp_path, train=Batches(), evaluation=evaluation, steps=8, early_stopping=2)
    result = run(tmp_path, train=Batches(), evaluation=evaluation, steps=100, early_stopping=2)
    assert result["step"] == 12
