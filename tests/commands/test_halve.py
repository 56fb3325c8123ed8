"""The command that halves a trained ViT."""

import pathlib
import signal
import time

import pytest
from helpers.halving import random_deit
from helpers.processes import Started, run_command

from halvit_jax.convert import weights_file

HALVE = "halvit_jax.halve"
FIELDS = {"width": 16, "depth": 2, "num_heads": 2, "patch_size": 2, "image_size": 8, "num_classes": 10}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    weights_file.save(path, "deit_small", random_deit(**FIELDS).variables, **FIELDS)
    return path


@pytest.mark.slow
def test_halve_stopped_by_sigterm_exits_with_75_and_resumes(
    teacher: pathlib.Path, digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out, log = tmp_path / "half.safetensors", tmp_path / "log.txt"
    arguments = ["--config=configs/halve_digits.py", f"--teacher={teacher}", f"--out={out}", "--images=64"]
    arguments += [f"--config.data.data_dir={digits_dir}", "--config.model.width=16", "--config.model.depth=2"]
    arguments += ["--config.model.num_heads=2", "--fit_steps=2000"]
    process = Started(HALVE, *arguments, stdout=log)
    deadline = time.monotonic() + 120
    while not log.exists() or "block 0" not in log.read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert "stopped by SIGTERM: the same command goes on from there" in log.read_text()
    printed = run_command(HALVE, *arguments).stdout
    assert "block 1: error of attention" in printed
    assert '"top1_after":' in printed
    assert f"--out={out} exists" in run_command(HALVE, *arguments, code=2).stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out=x.safetensors"], "give both --config=configs/NAME.py and --out=FILE.safetensors"),
        (["--out=x.npz"], "--out=x.npz must end in .safetensors"),
        (["--out=/nowhere/x.safetensors"], "is in a folder that does not exist; create /nowhere"),
        (["--out=x.safetensors", "--teacher=nowhere"], "teacher.init_from=nowhere does not exist"),
        (["--out=x.safetensors", "--images=0"], "--images"),
        (["--out=x.safetensors", "runs/vit_digits"], "flags look like --teacher=runs/vit_digits"),
    ],
)
def test_bad_flags_of_halve_are_one_line(flags: list[str], message: str) -> None:
    config = [] if "give both" in message else ["--config=configs/halve_digits.py"]
    error = run_command(HALVE, *config, *flags, code=2).stderr
    assert message in error.splitlines()[-1]
