"""Several real processes on this machine that train together, and what happens when one of them does not."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest
from helpers.processes import ROOT, Started
from helpers.tiers import tiered
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from halvit_jax import distributed
from halvit_jax.data import scenes

FIELDS = {
    "total_steps": 50,
    "loop.log_every": 1,
    "loop.eval_every": 25,
    "loop.checkpoint_every": 10,
    "batch_size": 64,
    "recipe_batch_size": 64,
    "model.width": 32,
    "model.depth": 2,
    "model.num_heads": 2,
    "data.virtual_shards": 8,
    "optim.warmup_epochs": 1.0,
    "cluster.heartbeat_timeout": 10,
    "cluster.start_timeout": 60,
}
MAIN = "halvit_jax.main"


class Processes:
    """`count` processes of one run; `programs` replaces what some ranks run."""

    def __init__(
        self,
        workdir: pathlib.Path,
        data_dir: pathlib.Path,
        *,
        count: int,
        devices: int = 1,
        programs: dict[int, str] | None = None,
        config: str = "halvit_digits",
        flags: Sequence[str] = (),
        **fields: object,
    ) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        self.workdir = workdir
        self.logs = [workdir / f"log_{rank}.txt" for rank in range(count)]
        port = free_port()
        values = (FIELDS | {"data.data_dir": data_dir} if config == "halvit_digits" else {}) | fields
        shared = [f"--config=configs/{config}.py", f"--workdir={workdir}", *flags]
        shared += [f"--config.{name}={value}" for name, value in values.items()]
        xla_flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        self.processes = []
        for rank, log in enumerate(self.logs):
            own = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={rank}"]
            arguments = [*shared, *(own if count > 1 else [])]
            program = (programs or {}).get(rank, "")
            log.write_text("")
            self.processes.append(Started(MAIN, *arguments, stdout=log, program=program, xla_flags=xla_flags))

    def until(self, text: str, *, rank: int = 0, seconds: float = 240.0) -> None:
        """Wait until a rank has printed something."""
        end = time.monotonic() + seconds
        while text not in self.output(rank):
            assert time.monotonic() < end, self.output(rank)[-3000:]
            assert self.processes[rank].poll() is None, self.output(rank)[-3000:]
            time.sleep(0.05)

    def codes(self, seconds: float = 240.0) -> list[int]:
        """The exit codes of all."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def output(self, rank: int) -> str:
        """What a rank has printed."""
        return self.logs[rank].read_text(errors="replace")

    def outputs(self) -> str:
        """What all have printed."""
        return "\n".join(map(self.output, range(len(self.logs))))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """The training loss of every step, from TensorBoard's files; later runs go on in them."""
    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0}).Reload().Tensors("train/loss")
    return {event.step: float(make_ndarray(event.tensor_proto)) for event in events}


def result(workdir: pathlib.Path) -> dict:
    """The run's result."""
    return json.loads((workdir / "result.json").read_text())


def assert_alike(ours: pathlib.Path, alone: pathlib.Path, steps: Sequence[int]) -> None:
    """The same losses at every step to 1e-5, the same scores, as a run of one process on one device."""
    found, expected = losses(ours), losses(alone)
    assert sorted(found) == sorted(expected) == list(steps)
    assert found == pytest.approx(expected, rel=1e-5)
    for name in ("eval", "ema_eval"):
        assert result(ours)[name]["loss"] == pytest.approx(result(alone)[name]["loss"], rel=1e-5)
        assert result(ours)[name]["top1"] == pytest.approx(result(alone)[name]["top1"], abs=1 / 364 + 1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, digits_dir: pathlib.Path) -> pathlib.Path:
    """The workdir of an unbroken run of one process."""
    run = Processes(tmp_path_factory.mktemp("alone"), digits_dir, count=1)
    assert run.codes() == [0], run.outputs()
    return run.workdir


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, digits_dir: pathlib.Path) -> pathlib.Path:
    """The workdir of an unbroken run of four processes."""
    run = Processes(tmp_path_factory.mktemp("four"), digits_dir, count=4)
    assert run.codes() == [0] * 4, run.outputs()
    return run.workdir


@pytest.mark.parametrize("then", tiered(["no more", "one goes on alone"], {"no more"}))
def test_a_sigterm_to_one_of_two_processes_preempts_both(
    then: str, digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """B4 and A4 of the test plan."""
    short = {"total_steps": 24, "loop.eval_every": 24, "model.depth": 1}
    run = Processes(tmp_path, digits_dir, count=2, **short)
    run.until("step 12/24")
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.codes(seconds=60) == [75, 75], run.outputs()
    stops = [re.search(r"stopped by .*: saved at step (\d+);", run.output(rank)) for rank in (0, 1)]
    assert stops[0][1] == stops[1][1]
    assert "rank 1 of 2: on " in run.output(1)
    if then == "no more":
        return
    again = Processes(tmp_path, digits_dir, count=1, **short)
    assert again.codes() == [0], again.outputs()
    assert f"resuming from the checkpoint of step {stops[0][1]}" in again.output(0)
    assert sorted(losses(tmp_path)) == list(range(1, 25))
    assert result(tmp_path)["step"] == 24


@pytest.mark.slow
def test_four_processes_learn_what_one_does(alone: pathlib.Path, four: pathlib.Path) -> None:
    assert_alike(four, alone, range(1, 51))


@pytest.mark.slow
def test_a_run_moves_and_resumes_on_four_two_and_one_process(
    alone: pathlib.Path, digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A4 of the test plan: 4 processes, then 2 that share parameters, then 1 of 8 devices.

    One device each: with several, XLA's CPU backend may wait for ever in an exchange between processes.
    """
    for count, fsdp in ((4, 1), (2, 2)):
        run = Processes(tmp_path, digits_dir, count=count, **{"mesh.fsdp": fsdp})
        run.until(f"step {16 if count == 4 else 32}/50")
        run.processes[count - 1].send_signal(signal.SIGTERM)
        assert run.codes(seconds=90) == [75] * count, run.outputs()
    last = Processes(tmp_path, digits_dir, count=1, devices=8)
    assert last.codes() == [0], last.outputs()
    assert_alike(tmp_path, alone, range(1, 51))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_when_one_of_four_is_killed_the_others_end_name_it_and_the_run_resumes(
    rank: int, four: pathlib.Path, digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """B2 of the test plan."""
    run = Processes(tmp_path, digits_dir, count=4)
    run.until("step 14/50")
    run.processes[rank].kill()
    began = time.monotonic()
    codes = run.codes(seconds=60)
    assert time.monotonic() - began < 30
    assert all(codes), run.outputs()
    # Whichever is quicker names it: we, or the runtime, which counts tasks.
    named = [f"\\nrank {rank} of 4 did not answer", r"stopped sending heartbeats\):\s+(?:\[\d\] )?" + str(rank)]
    if rank == 0:  # without the coordinator the runtime ends the others, and says no more than this
        named += ["rank 0, the coordinator, does not answer", "remote target coordination_service"]
    assert any(re.search(text, run.outputs()) for text in named), run.outputs()
    again = Processes(tmp_path, digits_dir, count=4)
    assert again.codes() == [0] * 4, again.outputs()
    assert result(tmp_path)["params_sha256"] == result(four)["params_sha256"]


DETECTION = {
    "total_steps": 4,
    "batch_size": 4,
    "recipe_batch_size": 4,
    "loop.log_every": 1,
    "loop.eval_every": 4,
    "loop.checkpoint_every": 4,
    "model.width": 32,
    "model.depth": 1,
    "model.num_heads": 2,
    "instances.canvases": "((160, 192), (192, 192))",
    "detection.width": 16,
    "detection.hidden": 16,
    "detection.mask_depth": 1,
    "detection.train_candidates": 40,
    "detection.train_proposals": 20,
    "detection.test_candidates": 40,
    "detection.test_proposals": 20,
    "detection.score_threshold": 0.01,
    "detection.detections": 10,
    "optim.warmup_steps": 1,
    "cluster.heartbeat_timeout": 60,
    "cluster.start_timeout": 120,
}


@pytest.mark.slow
def test_a_detector_sees_the_same_batches_and_finds_the_same_on_one_two_and_four_processes(
    tmp_path: pathlib.Path,
) -> None:
    """Two canvases, eight images of them: each is evaluated once, whatever the number of processes is."""
    data = tmp_path / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SPLITS", {"train": (1, 24), "val": (2, 7)})
        scenes.prepare(str(data))
    fields = DETECTION | {"instances.data_dir": data}
    runs = {}
    for count in (1, 2, 4):
        run = runs[count] = Processes(tmp_path / str(count), data, count=count, config="scenes_mask_rcnn", **fields)
        assert run.codes() == [0] * count, run.outputs()
        assert losses(run.workdir) == pytest.approx(losses(runs[1].workdir), rel=1e-4)
    assert sorted(losses(runs[1].workdir)) == [1, 2, 3, 4]
    found = {}
    for count in (1, 2, 4):  # the same weights
        file = tmp_path / f"found_{count}.json"
        flags = ("--mode=eval", f"--detections={file}")
        run = Processes(runs[1].workdir, data, count=count, config="scenes_mask_rcnn", flags=flags, **fields)
        assert run.codes() == [0] * count, run.outputs()
        rows = json.loads(file.read_text())
        found[count] = sorted(rows, key=lambda row: (row["image_id"], -row["score"], row["category_id"], row["bbox"]))
    evaluations = [json.loads(line) for line in (runs[1].workdir / "evals.jsonl").read_text().splitlines()]
    assert len(evaluations) == 3
    for count, evaluation in zip((1, 2, 4), evaluations, strict=True):
        assert evaluation["eval"] == pytest.approx(evaluations[0]["eval"], abs=1e-6)
        assert len({row["image_id"] for row in found[count]}) == 7
        assert [row["category_id"] for row in found[count]] == [row["category_id"] for row in found[1]]
        for name in ("bbox", "score"):
            values = [np.array([row[name] for row in found[each]]) for each in (count, 1)]
            np.testing.assert_allclose(*values, atol=1e-3)


SLEEPS = """
import time
from halvit_jax.data.pipeline import TrainLoader
original = TrainLoader.batches
def batches(self, start_step=0):
    for step, batch in enumerate(original(self, start_step), start_step):
        if step == 15:
            time.sleep(3600)
        yield batch
TrainLoader.batches = batches
from halvit_jax import main
from halvit_jax.cli import app
main.define_flags()
app.run(main.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleeps", "is stopped"])
def test_when_one_of_four_does_not_move_all_end_with_its_name(
    how: str, digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """G1 of the test plan; a process that the system has stopped cannot end by itself."""
    timeout, programs = 15, {2: SLEEPS} if how == "sleeps" else {}
    watchdog = {"watchdog.timeout": timeout, "watchdog.compile_timeout": 300, "cluster.heartbeat_timeout": 100}
    run = Processes(tmp_path, digits_dir, count=4, programs=programs, **watchdog)
    run.until("step 14/50")
    if how == "is stopped":
        run.processes[2].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    others = [process.wait(timeout + 25) for rank, process in enumerate(run.processes) if rank != 2]
    assert time.monotonic() - began < timeout + 12
    assert others == [70] * 3, run.outputs()
    if how == "sleeps":
        assert run.processes[2].wait(10) == 70
        assert "rank 2 of 4 delayed the others" in run.output(0)
        assert "in batches" in run.output(2)  # the stack of the sleeping thread
    else:
        assert "rank 2 of 4 did not answer" in run.output(0)
        run.processes[2].kill()
        run.processes[2].wait()
    assert all("no progress for" in run.output(rank) for rank in (0, 1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["nobody there", "one too few", "the same twice", "the port is taken"])
def test_processes_that_do_not_find_each_other_end_in_time_with_the_cause(
    wrong: str, digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """G3 of the test plan."""
    port, timeout = free_port(), 8
    ranks = {"nobody there": [1], "one too few": [0, 2], "the same twice": [0, 1, 1], "the port is taken": [0]}[wrong]
    count = 3 if wrong in ("one too few", "the same twice") else 2
    command = [sys.executable, "-m", MAIN, "--config=configs/halvit_digits.py", f"--workdir={tmp_path}"]
    command += [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    command += [f"--config.cluster.start_timeout={timeout}", "--config.cluster.heartbeat_timeout=10"]
    with socket.socket() as taken:
        if wrong == "the port is taken":
            taken.bind(("", port))
            taken.listen()
        began = time.monotonic()
        running = [
            subprocess.Popen(
                [*command, f"--process_id={rank}"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in ranks
        ]
        printed = [process.communicate(timeout=timeout + 40)[0] for process in running]
        assert time.monotonic() - began < timeout + 35
    assert all(process.returncode for process in running), printed
    expected = {
        "nobody there": r"rank 1 of 2: .*localhost:\d+ within cluster.start_timeout=8 s: only 1 of the .* not 0;",
        "one too few": r"rank \d of 3: .* only 0, 2 of the ranks 0 to 2 have started, not 1;",
        "the same twice": r"WARNING: rank 1 has also been started as process \d+ on ",
        "the port is taken": r"rank 0 of 2: not all processes connected to localhost:\d+",
    }[wrong]
    assert any(re.search(expected, text) for text in printed), printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "here:1"}, "go together; --num_processes, --process_id missing"),
        ({"num_processes": 2, "process_id": 0}, "go together; --coordinator missing"),
        (
            {"coordinator": "here:1", "num_processes": 2, "process_id": 2},
            "--process_id=2 must be below",
        ),
        ({"coordinator": "here", "num_processes": 2, "process_id": 0}, "--coordinator=here must be HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message), distributed.process_group(**given):
        pass


def test_a_single_process_exchanges_nothing() -> None:
    with distributed.process_group(), distributed.status_responder(lambda: ("", 0, False)):
        assert distributed.is_first()
        assert distributed.name() == ""
        assert distributed.collect_status("anything", step=1, waiting=False) == ""


def test_the_script_starts_a_cluster_and_ends_with_its_code(tmp_path: pathlib.Path) -> None:
    script = ["bash", "launch/local_cluster.sh"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr[:6]) == (2, "usage:")
    done = subprocess.run(
        [*script, "2", "--", "--config=configs/halvit_digits.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,  # below the script's INIT_MARGIN_S, for it leaves nobody behind who keeps its output open
        check=False,
    )
    assert done.returncode == 2
    for rank in (0, 1):
        assert f"[{rank}] error: give both --config=configs/NAME.py and --workdir=DIR" in done.stderr
