"""A run broken off and begun again ends with the same parameters, bit for bit."""

import json
import math
import pathlib
import re
import shutil
import subprocess
import time

import pytest
from helpers.processes import Started, run_command
from helpers.runs import MAIN, tiny

import halvit_jax
from halvit_jax.main import run_experiment
from halvit_jax.training.checkpoint.checkpointer import FOLDER, Checkpointer, manifest
from halvit_jax.trees import sha256

STEPS = 60


EVERYTHING = {  # beside what `tiny` switches on
    "loop.accumulate": 2,
    "data.augment": "rand-m9-mstd0.5-inc1",
    "data.repeated_aug": 3,
    "optim.clip_norm": 1.0,
    "classification.mix_group": 8,
    "classification.norm_group": 8,
}
RESNET = {f"model.{field}": None for field in ("patch_size", "width", "depth", "num_heads")} | {
    "model.name": "resnet18",
    "model.depths": (1, 1, 1, 1),
    "model.image_size": 16,
}


@pytest.mark.parametrize(
    ("model", "steps", "broken_at"),
    [
        pytest.param({"model.depth": 1}, 12, (6,), id="halvit"),
        pytest.param({}, STEPS, (1, 7, 30, 59), id="halvit at four steps", marks=pytest.mark.slow),
        # BatchNorm's statistics are state too.
        pytest.param(RESNET, STEPS, (1, 7, 30, 59), id="resnet at four steps", marks=pytest.mark.slow),
    ],
)
def test_a_run_resumed_at_any_step_ends_with_the_same_parameters(
    model: dict,
    steps: int,
    broken_at: tuple[int, ...],
    digits_dir: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = math.gcd(steps, *broken_at)
    cadence = {"total_steps": steps, "loop.eval_every": steps, "loop.checkpoint_every": every, "save.keep": 1}
    config = tiny(digits_dir, **EVERYTHING | cadence | model)
    seal = manifest.write

    def seal_and_copy(folder: pathlib.Path, step: int) -> None:
        seal(folder, step)
        if step in broken_at:
            shutil.copytree(folder, tmp_path / str(step) / FOLDER / str(step))

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", seal_and_copy)
        whole = run_experiment(config, tmp_path / "whole")
    config.loop.checkpoint_every = steps  # when it is saved changes nothing
    for step in broken_at:
        resumed = run_experiment(config, tmp_path / str(step))
        assert {**resumed, "images_per_s": 0} == {**whole, "images_per_s": 0}, step


@pytest.mark.slow  # a minute, and tests/faults/kill.py kills hundreds
def test_a_killed_run_resumes_and_ends_with_the_same_parameters(
    digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arguments = [
        "--config=configs/halvit_digits.py",
        f"--config.data.data_dir={digits_dir}",
        "--config.total_steps=30",
        "--config.batch_size=32",
        "--config.loop.eval_every=1000",
        "--config.loop.checkpoint_every=5",
        "--config.loop.log_every=10",
        "--config.model.width=48",
        "--config.model.drop_path=0.1",
        "--config.classification.mixup=0.8",
        "--config.optim.warmup_epochs=0.5",
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_command(MAIN, *arguments, f"--workdir={whole}")
    process = Started(MAIN, *arguments, f"--workdir={broken}", stdout=tmp_path / "log.txt")
    deadline = time.monotonic() + 120
    while not (broken / "checkpoints" / "10").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (broken / "result.json").exists()
    done = run_command(MAIN, *arguments, f"--workdir={broken}")
    assert "resuming from the checkpoint of step" in done.stdout
    results = [json.loads((workdir / "result.json").read_text()) for workdir in (whole, broken)]
    assert results[0]["params_sha256"] == results[1]["params_sha256"]
    assert results[0]["eval"] == results[1]["eval"]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line_and_it_resumes_once_space_is_freed(
    digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """C1 of the test plan, on a file system of its own that holds two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2600k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    arguments = [
        "--config=configs/halvit_digits.py",
        f"--config.data.data_dir={digits_dir}",
        "--config.total_steps=40",
        "--config.batch_size=32",
        "--config.loop.eval_every=1000",
        "--config.loop.checkpoint_every=10",
        "--config.loop.log_every=10",
        "--config.model.width=48",
        "--config.optim.warmup_epochs=0.5",
    ]
    try:
        run_command(MAIN, *arguments, f"--workdir={tmp_path / 'whole'}")
        error = run_command(MAIN, *arguments, f"--workdir={disk / 'run'}", code=3).stderr
        assert re.search(
            r"^error: the checkpoint of step \d+ could not be written to .* bytes, [\d,]+ are free; given up",
            error.splitlines()[-1],
        )
        assert len(error.splitlines()) == 1  # and none of Orbax's tracebacks
        assert "No space left on device" in error
        assert "step 10  good" in run_command("halvit_jax.check", f"--workdir={disk / 'run'}", "--files_only").stdout
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        assert (
            "resuming from the checkpoint of step" in run_command(MAIN, *arguments, f"--workdir={disk / 'run'}").stdout
        )
        results = [json.loads((run / "result.json").read_text()) for run in (tmp_path / "whole", disk / "run")]
        assert results[0]["params_sha256"] == results[1]["params_sha256"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_run_is_resumed_with_changed_fields_which_are_logged_and_the_old_config_is_kept(
    digits_dir: pathlib.Path, workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the message about values that are not finite advises: another learning rate and the guard."""
    before, result_before = (workdir / "config.json").read_text(), json.loads((workdir / "result.json").read_text())
    changes = {"total_steps": 9, "optim.learning_rate": 1e-3, "skip_updates.norm_factor": 20.0}
    config = tiny(digits_dir, **{"loop.eval_every": 8} | changes)
    result = run_experiment(config, workdir, resume_changed=True)
    assert result["step"] == 9
    out = capsys.readouterr().out
    for line in ("optim.learning_rate=0.001, before 0.003", "total_steps=9, before 8"):
        assert f"WARNING: resuming with {line}" in out
    assert "differ in grad_spikes, which starts anew" in out
    assert (workdir / "config.step_8.json").read_text() == before
    assert json.loads((workdir / "result.step_8.json").read_text()) == result_before
    assert json.loads((workdir / "config.json").read_text())["total_steps"] == 9
    best = halvit_jax.load(workdir, step="best")[1]["params"]
    assert sha256(best) == sha256(
        halvit_jax.load(workdir, step=8 if result_is_worse(workdir, result) else 9)[1]["params"]
    )


def result_is_worse(workdir: pathlib.Path, result: dict) -> bool:
    """Whether step 9, as the run ended, is worse than step 8."""
    checkpointer = Checkpointer(workdir, read_only=True)
    score = checkpointer.metadata(8)["score"]
    checkpointer.close()
    return result["ema_eval"]["top1"] < score
