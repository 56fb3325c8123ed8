"""The real command, end to end, and its answers to bad input."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from helpers.processes import ONE_DEVICE, ROOT, run_command
from helpers.runs import MAIN, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

import halvit_jax
from halvit_jax import data, export, storage
from halvit_jax.cli import app
from halvit_jax.experiment.trained import load_trained
from halvit_jax.main import run_experiment
from halvit_jax.training.profiling import ProfileRange

PREDICT = "halvit_jax.predict"


def test_the_command_trains_then_finds_itself_finished_then_evaluates(
    digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arguments = [
        "--config=configs/halvit_digits.py",
        f"--workdir={tmp_path}/new/run",
        f"--config.data.data_dir={digits_dir}",
        "--config.model.depth=1",
        "--config.total_steps=30",
        "--config.loop.eval_every=20",
        "--config.loop.checkpoint_every=20",
        "--config.optim.warmup_epochs=0.0",
        "--config.loop.log_every=10",
    ]
    first = subprocess.run(
        [sys.executable, "-m", MAIN, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ONE_DEVICE},
        timeout=300,
        check=False,
    )
    assert first.returncode == 0, first.stderr
    result = json.loads((tmp_path / "new/run/result.json").read_text())
    assert result["step"] == 30
    assert result["eval"].keys() == result["ema_eval"].keys() == {"loss", "top1", "top5"}
    assert result["images_per_s"] > 0
    assert result["params"] == 60_298
    assert len(result["params_sha256"]) == 64
    assert "images/s" in first.stdout
    assert "ETA" in first.stdout
    again = run_command(MAIN, *arguments)
    assert "finished: the newest checkpoint is of step 30 of 30" in again.stdout
    repeated = json.loads((tmp_path / "new/run/result.json").read_text())
    assert repeated == result
    evaluated = json.loads(run_command(MAIN, *arguments, "--mode=eval").stdout.splitlines()[-1])
    assert evaluated == {"eval": result["eval"], "ema_eval": result["ema_eval"]}


BAD_FIELDS = {
    "model.name='halvit_tny' is unknown; did you mean 'halvit_tiny'": {"model.name": "halvit_tny"},
    "model.num_heads=5 does not divide model.width=32": {"model.num_heads": 5},
    "model.patch_size=3 does not divide model.image_size=8": {"model.patch_size": 3},
    "model.width=-32 must not be negative": {"model.width": -32},
    "model.depth=0 must be at least 1": {"model.depth": 0},
    "model.attention='tide' is not one of full, tied": {"model.attention": "tide"},
    "model.num_classes=-1 must not be negative": {"model.num_classes": -1},
    "model.depth=2: resnet18 has no such field": {"model.name": "resnet18"},
    "batch_size=-32 must be at least 1": {"batch_size": -32},
    "batch_size=30 does not divide over mesh.data x mesh.fsdp = 8 devices; set it to 24 or 32": {"batch_size": 30},
    "mesh.data=3 mesh.fsdp=1 mesh.tensor=1 must be positive, multiply to the 8 devices": {"mesh.data": 3},
    "mesh.data x mesh.fsdp = 8 devices in loop.accumulate=3 parts; set it to 24 or 48": {"loop.accumulate": 3},
    "model.drop_path=1.0 must lie in [0, 1)": {"model.drop_path": 1.0},
    "model.ffn_ratio=0.0 leaves nothing of model.width=32": {"model.ffn_ratio": 0.0},
    "total_steps=8 and num_epochs=3: set one": {"num_epochs": 3},
    "loop.eval_every=0 must be at least 1": {"loop.eval_every": 0},
    "loop.ema_decay=1.5 must lie in": {"loop.ema_decay": 1.5},
    "compute_dtype='float16' is not one of auto, float32, bfloat16": {"compute_dtype": "float16"},
    "data.name='mnist' is not prepared": {"data.name": "mnist"},
    "split 'validation' of data.name='digits' is unknown": {"data.eval_split": "validation"},
    "data.crop='middle' is not one of": {"data.crop": "middle"},
    "model.num_classes=12, but data.name='digits' has 10 classes": {"model.num_classes": 12},
    "classification.loss='hinge' is not one of": {"classification.loss": "hinge"},
    "classification.mixup_mode='row' is not one of batch, elem": {"classification.mixup_mode": "row"},
    "classification.erase=1.5 must lie between 0 and 1": {"classification.erase": 1.5},
    "classification.mixup=-1.0 must not be negative": {"classification.mixup": -1.0},
    "optim.name='adam' is not one of adamw, lamb, sgd": {"optim.name": "adam"},
    "optim.schedule='linear' is not one of": {"optim.schedule": "linear"},
    "optim.warmup_epochs=100.0 are 4400 steps of 8": {"optim.warmup_epochs": 100.0},
}


@pytest.mark.parametrize("message", BAD_FIELDS)
def test_bad_fields_are_refused_with_one_line_before_anything_is_written(
    message: str, digits_dir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_experiment(tiny(digits_dir, **BAD_FIELDS[message]), tmp_path / "run")
    assert ended.value.code == app.ExitCode.BAD_INPUT
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model.nme=x"], "model.nme is not a field of the config; did you mean --config.model.name?"),
        (["--config.batch_size=many"], "flag --config.batch_size=many"),
        (["--config.model.name=halvit_tny"], "did you mean 'halvit_tiny'"),
        (["--mode=sleep"], "flag --mode=sleep"),
        (["--config=configs/shvit.py:s9"], "variant 's9' is not one of s1, s2, s3, s4, distilled, 384, 512"),
        (["--wrkdir=x"], "Unknown command line flag 'wrkdir'"),
        (["stray"], "unexpected arguments ['stray']"),
        (["--step=4"], "--step=4 is for --mode=eval"),
        (["--mode=eval", "--profile=1:2"], "--profile=1:2 is for --mode=train"),
    ],
)
def test_a_bad_command_line_is_refused_with_one_line(
    arguments: list[str], message: str, tmp_path: pathlib.Path
) -> None:
    done = run_command(MAIN, "--config=configs/halvit_digits.py", f"--workdir={tmp_path}", *arguments, code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_bad_field_is_refused_before_slow_imports(tmp_path: pathlib.Path) -> None:
    program = (
        "import runpy, sys\n"
        "try:\n"
        "    runpy.run_module(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    print({'jax', 'tensorflow', 'orbax', 'clu'} & sys.modules.keys())"
    )
    arguments = ["--config=configs/halvit_digits.py", "--config.model.name=halvit_tny", f"--workdir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = {[MAIN, *arguments]}\n{program}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "{'jax'}\n")
    assert "did you mean 'halvit_tiny'" in done.stderr


def test_missing_flags_are_named() -> None:
    assert "give both --config=configs/NAME.py and --workdir=DIR" in run_command(MAIN, code=2).stderr
    assert "give --workdir=DIR and at least one image" in run_command(PREDICT, code=2).stderr
    assert "is not the workdir of a run" in run_command(PREDICT, "--workdir=/nowhere", "a.png", code=2).stderr


def test_evaluating_before_training_is_refused(
    digits_dir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_experiment(tiny(digits_dir), tmp_path / "typo", mode="eval")
    assert "has no checkpoint to evaluate; train first" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model.width": 64}, "model.width=32 (now 64)"),
        pytest.param({"model.ffn": "dense"}, "model.ffn=None (now 'dense')", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_field_and_left_alone(
    changes: dict[str, Any],
    field: str,
    finished: tuple[pathlib.Path, dict[str, Any]],
    workdir: pathlib.Path,
    digits_dir: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (workdir / "config.json").read_text()
    refusals = {
        "was trained to step 8 with": {},
        "is of another model or optimizer: it was trained with": {"resume_changed": True},
    }
    refusals["of another model or optimizer: it was trained with"] = {"mode": "eval"}
    for words, flags in refusals.items():
        with pytest.raises(SystemExit) as ended:
            run_experiment(tiny(digits_dir, **{"loop.eval_every": 8} | changes), workdir, **flags)
        assert ended.value.code == app.ExitCode.BAD_INPUT
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert f"{words} {field}; give the old values" in error
    assert (workdir / "config.json").read_text() == before
    assert run_experiment(tiny(digits_dir), workdir, mode="eval")["eval"] == finished[1]["eval"]


@pytest.mark.slow
def test_profile_traces_steps_into_the_workdir(digits_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = tiny(digits_dir, **{"total_steps": 3, "model.depth": 1})
    run_experiment(config, tmp_path, profile=ProfileRange(1, 2))
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))


def test_a_profile_beyond_the_run_is_refused(
    digits_dir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_experiment(tiny(digits_dir), tmp_path / "run", profile=ProfileRange(5, 8))
    assert "--profile=5:8 must end below 8 steps" in capsys.readouterr().err


def test_further_evaluation_sets_have_lines_curves_and_results_of_their_own(
    digits_dir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(digits_dir, **{"data.evals": ("half=digits:test[:50%]",), "model.depth": 1, "loop.eval_every": 8})
    result = run_experiment(config, tmp_path)
    names = {"eval", "ema_eval", "eval_half", "ema_eval_half"}
    saved = json.loads((tmp_path / "result.json").read_text())
    assert {name for name, value in saved.items() if isinstance(value, dict)} == names
    assert saved["eval_half"].keys() == {"loss", "top1", "top5"}
    assert saved["eval_half"]["loss"] != saved["eval"]["loss"]
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert all(["step", "8", name] in lines for name in names)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in names:
        (event,) = events.Tensors(f"{name}/top1")
        assert (event.step, float(make_ndarray(event.tensor_proto))) == (8, pytest.approx(result[name]["top1"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--workdir=s3://bucket/run"],
            "--workdir=s3://bucket/run must be a local path or the address of a bucket, gs://BUCKET/FOLDER",
        ),
        (["--workdir=x", "--mode=eval", "--step=newest"], "--step=newest must be the step of a checkpoint, or best"),
    ],
)
def test_a_workdir_and_a_step_are_refused_before_anything_is_made(flags: list[str], message: str) -> None:
    error = run_command(MAIN, "--config=configs/halvit_digits.py", *flags, code=2).stderr
    assert error.startswith(f"error: {message}")
    assert not (ROOT / "s3:").exists()


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(storage.parse("~/runs/a")) == "/home/someone/runs/a"


@pytest.mark.slow
def test_a_run_on_grey_images_trains_resumes_and_predicts(digits_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    grey = {"model.in_channels": 1, "task.mean": (0.5,), "task.std": (0.5,), "data.augment": "rand-m9-mstd0.5-inc1"}
    workdir = tmp_path / "run"
    result = run_experiment(tiny(digits_dir, **grey), workdir)
    assert run_experiment(tiny(digits_dir, **grey), workdir)["params_sha256"] == result["params_sha256"]
    predictor = halvit_jax.load_predictor(workdir)
    assert predictor.variables["params"]["embed"]["kernel"].shape == (2, 2, 1, 32)
    assert predictor.preprocess(np.zeros((9, 12, 3), np.uint8)).shape == (8, 8, 1)
    assert len(predictor(np.zeros((9, 12), np.uint8))["top5"]) == 5
    image = tmp_path / "a.png"
    data.write_png(str(image), np.zeros((8, 8, 3), np.uint8))
    flags = (f"--workdir={workdir}", f"--attention={tmp_path}/out.png", str(image))
    assert len(json.loads(run_command(PREDICT, *flags).stdout)["top5"]) == 5
    for kind, name in (("stablehlo", "model.zip"), ("safetensors", "model.safetensors")):
        out = tmp_path / name
        export.verify_export(trained := load_trained(workdir), export.export(trained, kind, out), out)
    assert halvit_jax.load_predictor(tmp_path / "model.safetensors").preprocess(image).shape == (8, 8, 1)
