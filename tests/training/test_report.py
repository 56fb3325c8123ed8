import functools
import itertools
import os
import pathlib
import re
import shlex
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from clu import metric_writers
from helpers.runs import classification
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from halvit_jax.config import default_config
from halvit_jax.models import create_model
from halvit_jax.training import loop
from halvit_jax.training.checkpoint.checkpointer import Checkpointer
from halvit_jax.training.fault_tolerance.preemption import PreemptionHandler
from halvit_jax.training.fault_tolerance.watchdog import Watchdog
from halvit_jax.training.optim import make_optimizer
from halvit_jax.training.report import GRID, Report, grid
from halvit_jax.training.sharding import make_mesh
from halvit_jax.training.state import abstract_state, init_state

BATCH, STEPS = 16, 6


class Noise:
    """Sixteen fixed images, as a loader for training and for evaluation."""

    num_examples = BATCH
    steps_per_epoch = 1
    info = None

    def __init__(self, *, endless: bool) -> None:
        self._endless = endless

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.integers(0, 256, (BATCH, 8, 8, 3), np.uint8),
            "label": rng.integers(0, 10, BATCH, np.int32),
            "mask": np.ones(BATCH, bool),
        }
        return itertools.repeat(batch) if self._endless else iter([batch])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[EventAccumulator, dict[str, Any]]:
    """What TensorBoard reads of a short run of the real loop, and the run's result."""
    workdir, config = tmp_path_factory.mktemp("run"), default_config()
    model = create_model("halvit_tiny", width=16, depth=1, num_heads=2, image_size=8, patch_size=4, num_classes=10)
    task = classification(model)
    shapes, _ = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    task.init = lambda key: (jax.tree.map(lambda shape: np.full(shape.shape, 0.1, np.float32), shapes), {})
    fields = config.optim.to_dict() | {"scaling": "none", "warmup_epochs": 2.0}
    optimizer = make_optimizer(**fields, batch_size=BATCH, steps_per_epoch=1, total_steps=STEPS)
    report = Report(workdir, total_steps=STEPS, batch_size=BATCH)
    report.hyperparameters(config.to_dict())
    checkpointer = Checkpointer(workdir)
    mesh = make_mesh()
    abstract = abstract_state(task, optimizer, mesh=mesh, use_ema=True)
    fresh = functools.partial(init_state, task, optimizer, seed=0, use_ema=True)
    start = loop.restore_or_init(checkpointer, report, abstract, fresh, eval_every=3)
    watchdog = Watchdog(workdir / "debug", timeout=600.0, compile_timeout=600.0)
    result = loop.train(
        task,
        optimizer,
        start,
        Noise(endless=True),
        {"eval": Noise(endless=False)},
        mesh=mesh,
        seed=0,
        ema_decay=0.9,
        preemption=PreemptionHandler(),
        watchdog=watchdog,
        debug_folder=workdir / "debug",
        checkpointer=checkpointer,
        report=report,
        total_steps=STEPS,
        log_every=2,
        eval_every=3,
        checkpoint_every=STEPS,
    )
    checkpointer.close()
    report.close()
    return EventAccumulator(str(workdir)).Reload(), result


def _curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: float(make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)}


def test_tensorboard_shows_every_promised_curve(run: tuple[EventAccumulator, dict[str, Any]]) -> None:
    events, _ = run
    tags = set(events.Tags()["tensors"])
    training = ("loss", "top1", "top5", "learning_rate", "images_per_s", "waiting_for_data")
    promised = {f"train/{name}" for name in training}
    promised |= {f"{name}/{score}" for name in ("eval", "ema_eval") for score in ("loss", "top1", "top5")}
    assert promised <= tags
    assert {"train_images", "parameters"} <= {tag.split("/")[0] for tag in tags}
    assert [*_curve(events, "train/loss")] == [2, 4, 6]
    assert [*_curve(events, "eval/loss")] == [*_curve(events, "ema_eval/top5")] == [3, 6]


def test_the_curves_hold_the_values_of_the_run(run: tuple[EventAccumulator, dict[str, Any]]) -> None:
    events, result = run
    rates = [1e-6 + (5e-4 - 1e-6) / 2]  # of the second step, in the warm-up
    rates += [1e-5 + (5e-4 - 1e-5) * (1 + np.cos(np.pi * step / STEPS)) / 2 for step in (3, 5)]
    assert list(_curve(events, "train/learning_rate").values()) == pytest.approx(rates, rel=1e-4)
    assert _curve(events, "eval/loss")[STEPS] == pytest.approx(result["eval"]["loss"])
    assert _curve(events, "ema_eval/top1")[STEPS] == pytest.approx(result["ema_eval"]["top1"])
    assert all(0 <= share <= 1 for share in _curve(events, "train/waiting_for_data").values())
    assert np.median(list(_curve(events, "train/images_per_s").values())) == pytest.approx(result["images_per_s"])


def test_tensorboard_shows_the_first_batch_as_a_grid_at_step_0(run: tuple[EventAccumulator, dict[str, Any]]) -> None:
    events, _ = run
    (tag,) = (tag for tag in events.Tags()["tensors"] if tag.startswith("train_images"))
    (event,) = events.Tensors(tag)
    width, height, png = make_ndarray(event.tensor_proto)[:3]
    assert (event.step, int(width), int(height)) == (0, GRID * 8, 2 * 8)
    assert png.startswith(b"\x89PNG")


def test_tensorboard_holds_the_hyper_parameters(run: tuple[EventAccumulator, dict[str, Any]]) -> None:
    content = run[0].PluginTagToContent("hparams")
    text = b"".join(content.values())
    assert b"optim.learning_rate" in text
    assert b"model.name" in text
    assert b"halvit_tiny" in text


def test_a_grid_fills_rows_from_left_to_right() -> None:
    images = np.arange(11.0).reshape(11, 1, 1, 1) * np.ones((1, 2, 3, 3))
    whole = grid(images)
    assert whole.shape == (2 * 2, GRID * 3, 3)
    places = whole.reshape(2, 2, GRID, 3, 3)[:, 0, :, 0, 0]
    np.testing.assert_array_equal(places, np.pad(np.arange(11.0), (0, 5)).reshape(2, GRID))


def test_a_grid_shows_at_most_64_images() -> None:
    assert grid(np.zeros((100, 2, 2, 3))).shape == (GRID * 2, GRID * 2, 3)
    assert grid(np.zeros((1, 2, 2, 3))).shape == (2, GRID * 2, 3)


def _report(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, *, tty: bool) -> Report:
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty)
    return Report(tmp_path, total_steps=100, batch_size=10, progress=("loss", "top1"), units={"top1": "%"})


SCALARS = {"loss": 1.5, "top1": 0.25, "learning_rate": 0.1}


def test_on_a_terminal_the_progress_line_is_written_over(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _report(tmp_path, monkeypatch, tty=True)
    report.training(25, SCALARS, steps=25)
    report.training(50, SCALARS, steps=25)
    out = capsys.readouterr().out
    assert out.count("\r\033[K") == 2
    assert "\n" not in out
    assert "[#####---------------] step 25/100   25%  loss 1.5000  top1 25.00%" in out
    report.log("a line that stays")
    assert capsys.readouterr().out == "\r\033[Ka line that stays\n"
    report.log("another")
    assert capsys.readouterr().out == "another\n"
    report.close()


def test_elsewhere_the_progress_is_plain_lines(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _report(tmp_path, monkeypatch, tty=False)
    report.training(25, SCALARS, steps=25)
    report.evaluation(25, "eval", {"loss": 2.0, "top1": 0.5})
    out = capsys.readouterr().out
    assert "\r" not in out
    assert "\033" not in out
    first, second = out.splitlines()
    assert first.startswith("step 25/100   25%  loss 1.5000  top1 25.00%")
    assert "images/s" in first
    assert "ETA" in first
    assert second == "step 25  eval  loss 2.0000  top1 50.00%"
    report.close()


def test_speed_counts_training_only_and_waiting_is_a_share_of_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    report = _report(tmp_path, monkeypatch, tty=False)
    assert report.images_per_s is None

    def spend(seconds: float) -> None:
        now[0] += seconds

    spend(30.0)  # compiling
    report.first_step_done()
    with report.waiting_for_data():
        spend(1.0)
    spend(3.0)
    with report.pausing():
        spend(50.0)
    report.training(5, SCALARS, steps=5)  # four of them in four seconds, ten images each
    assert report.images_per_s == pytest.approx(10.0)
    assert "data 25%" in capsys.readouterr().out
    spend(2.0)
    report.training(10, SCALARS, steps=5)
    assert report.images_per_s == pytest.approx((10.0 + 25.0) / 2)
    assert "25 images/s  data 0%  ETA 0:00:36" in capsys.readouterr().out
    report.close()


def test_the_first_step_alone_is_no_speed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = _report(tmp_path, monkeypatch, tty=False)
    report.first_step_done()
    report.training(1, SCALARS, steps=1)
    assert report.images_per_s is None
    report.close()


def test_a_run_goes_on_where_curves_cannot_be_written(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(metric_writers.SummaryWriter):
        def write_scalars(self, *_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(metric_writers, "SummaryWriter", FullDisk)
    report = Report(tmp_path, total_steps=4, batch_size=2)
    for step in range(1, 5):
        report.training(step, {"loss": 1.0}, steps=1)
        time.sleep(0.05)  # it is written by another thread
    report.close()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("WARNING: no more curves: ") for line in lines) == 1
    assert sum(line.startswith("step ") for line in lines) == 4


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_live_line_fits_into_the_terminal(
    columns: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A longer one is broken, and only its last row is written over."""
    monkeypatch.setattr("shutil.get_terminal_size", lambda **_: os.terminal_size((columns, 24)))
    report = _report(tmp_path, monkeypatch, tty=True)
    report.first_step_done()
    for step in (25, 50):
        report.training(step, SCALARS, steps=25)
    lines = [line for line in re.split(r"\r\033\[K|\n", capsys.readouterr().out) if line.startswith(("[", "step"))]
    assert len(lines) == 2
    assert all(len(line) < columns for line in lines)
    assert ("[##########----------]" in lines[1]) == (columns > 40)
    assert ("ETA" in lines[1]) == (columns > 40)
    assert ("data" in lines[1]) == (columns == 200)
    report.close()


def test_an_evaluation_and_a_long_stretch_move_the_live_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    report = _report(tmp_path, monkeypatch, tty=True)
    report.waiting("compiling the training step")
    report.evaluating("ema_eval", 3, 4)
    report.training(25, SCALARS, steps=25)
    report.tick(26)  # within a second
    now[0] += 2.0
    report.tick(27)
    lines = capsys.readouterr().out.split("\r\033[K")[1:]
    assert lines[0] == "compiling the training step"
    assert lines[1].startswith("[###############-----] ema_eval 3/4   75%")
    assert [line.split("step ")[1].split("/")[0] for line in lines[2:]] == ["25", "27"]
    assert "loss 1.5000" in lines[3]
    report.close()


def test_elsewhere_no_line_is_live(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _report(tmp_path, monkeypatch, tty=False)
    report.waiting("compiling")
    report.evaluating("eval", 4, 4)
    report.tick(7)
    assert capsys.readouterr().out == ""
    report.close()


def test_the_printed_commands_can_be_copied_for_any_workdir(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _report(tmp_path, monkeypatch, tty=False)
    report.result({"params": 3, "step": 4, "images_per_s": None}, tmp_path / "my runs")
    use = next(line for line in capsys.readouterr().out.splitlines() if "use it" in line)
    assert f"--workdir={tmp_path}/my runs" in shlex.split(use)
    report.close()
