"""A run broken off and begun again ends with the same parameters, bit for bit."""

import json
import pathlib
import shutil
import signal
import subprocess
import time

import pytest
from test_main import MAIN, ROOT, one_device, tiny

from halvit_jax.main import work

STEPS = 60


@pytest.mark.parametrize("model", ["halvit_tiny", "resnet18"])
def test_going_on_from_any_checkpoint_changes_nothing(
    model: str, digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    changes = {"total_steps": 12, "eval_every": 12, "checkpoint_every": 5, "keep_checkpoints": 3}
    if model == "resnet18":  # its BatchNorm statistics are state too
        vit_fields = ("patch_size", "width", "depth", "num_heads", "drop_path")
        changes |= {"model.name": model, "model.image_size": 32}
        changes |= {f"model.{field}": None for field in vit_fields}
    whole = work(tiny(digits_dir, **changes), tmp_path / "whole")
    # The schedule needs the whole length, so a broken run is one whose later checkpoints are taken away.
    for step in ("12", "10"):
        shutil.rmtree(tmp_path / "whole" / "checkpoints" / step)
    resumed = work(tiny(digits_dir, **changes), tmp_path / "whole")
    assert {**resumed, "images_per_s": 0} == {**whole, "images_per_s": 0}


def test_killed_and_begun_again_ends_the_same(digits_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    command = [
        *MAIN,
        "--config=configs/halvit_digits.py",
        f"--config.data.data_dir={digits_dir}",
        f"--config.total_steps={STEPS}",
        "--config.eval_every=1000",
        "--config.checkpoint_every=10",
        "--config.log_every=10",
        "--config.model.width=48",
        "--config.model.drop_path=0.1",
        "--config.task.mixup=0.8",
        "--config.optim.warmup_epochs=1.0",
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    where = {"cwd": ROOT, "env": one_device()}
    subprocess.run([*command, f"--workdir={whole}"], **where, check=True, capture_output=True)
    process = subprocess.Popen([*command, f"--workdir={broken}"], **where, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (broken / "checkpoints" / "20").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "result.json").exists()
    done = subprocess.run([*command, f"--workdir={broken}"], **where, check=True, capture_output=True, text=True)
    assert "going on from the checkpoint of step" in done.stdout
    results = [json.loads((workdir / "result.json").read_text()) for workdir in (whole, broken)]
    assert results[0]["params_sha256"] == results[1]["params_sha256"]
    assert results[0]["eval"] == results[1]["eval"]
