"""The plan of a run on a TPU that is not here, and the scripts that start runs on machines that are not here."""

import json
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import pytest
from absl import flags
from helpers.plans import OUT_OF_MEMORY, FakeLowered, digits_config, prepared
from helpers.processes import run_command

from halvit_jax import plan
from halvit_jax.analysis import aot_plan

ROOT = pathlib.Path(__file__).parents[2]


def test_the_table_ends_with_the_largest_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot_plan, "largest_batch", lambda report, compiled: compiled(256)["fits"] * 256)
    assert _main(monkeypatch, largest_batch=True) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "largest batch that was compiled and fits: 256"


def _main(
    monkeypatch: pytest.MonkeyPatch, *, error: str = "", json_out: bool = False, largest_batch: bool = False
) -> int:
    """The exit code of `main` on the simulated devices, whose compiler is replaced."""
    lowered = FakeLowered(temporaries=1, error=error)
    subject = prepared(digits_config(fsdp=2))
    monkeypatch.setattr(plan, "tpu_devices", lambda topology: jax.devices())
    monkeypatch.setattr(aot_plan, "prepare", lambda *_: subject._replace(step=_Step(subject.step, lowered)))
    values = types.SimpleNamespace(
        config=subject.config, topology="v5e:2x4", json=json_out, largest_batch=largest_batch
    )
    monkeypatch.setattr(flags, "FLAGS", values)
    try:
        plan.main(["plan"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class _Step:
    """A real step whose lowering is replaced."""

    def __init__(self, step: Any, lowered: FakeLowered) -> None:
        self._step, self._lowered = step, lowered

    def __call__(self, *arguments: Any) -> Any:
        return self._step(*arguments)

    def lower(self, *arguments: Any) -> FakeLowered:
        return self._lowered


def test_the_report_of_a_run_that_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert _main(monkeypatch, json_out=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert (report["devices"], report["hosts"], report["batch_per_device"]) == (8, 1, 16)
    assert report["untied"]["parameters"] == 451_498  # of configs/vit_digits.py
    assert report["parameters"] == 228_778
    forward = 2 * 16 * 4 * 17 * 12 * 96**2  # of 16 images in 4 blocks: 17 tokens times 12 d^2 weights
    assert 3.0 < report["flops"] / forward < 3.3  # the backward pass costs twice that; attention and ends a little
    assert report["step_s_at_peak"] == report["flops"] / 197e12
    assert report["bytes_moved"] == 819e6
    assert report["step_s_of_memory"] == pytest.approx(1e-3)


def test_the_table_of_a_run_that_fits_and_of_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert _main(monkeypatch) == 0
    logged = capsys.readouterr().out
    assert logged.splitlines()[-1] == "it fits"
    assert "all-gather: 1 in the step" in logged
    assert (
        "memory: 0.8 GB to and from HBM, 1.0 ms at its bandwidth\na step takes at least 1.0 ms: memory-bound" in logged
    )
    assert _main(monkeypatch, error=OUT_OF_MEMORY) == 1
    logged = capsys.readouterr().out
    assert "IT DOES NOT FIT" in logged
    assert all(knob in logged for knob in ("mesh.fsdp", "accumulate", "model.remat"))
    assert "16.50G" in logged


@pytest.mark.parametrize(
    ("arguments", "logged"),
    [
        (["--topology=v5e:4x4"], "give both --config"),
        (["--config=configs/halvit_tiny.py"], "give both --config"),
        (["--config=configs/halvit_tiny.py", "--topology=v5e:3x4"], "--topology='v5e:3x4'"),
        (["--config=configs/halvit_tiny.py", "--topology=v5e:4x4", "more"], "unexpected arguments ['more']"),
    ],
)
def test_bad_input_is_answered_with_one_line(arguments: list[str], logged: str) -> None:
    done = run_command("halvit_jax.plan", *arguments, code=2)
    assert logged in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_real_compile_for_a_tpu() -> None:
    pytest.importorskip("libtpu", reason='the TPU compiler is not installed: pip install "jax[tpu]"')
    command = [sys.executable, "-m", "halvit_jax.plan", "--config=configs/halvit_digits.py", "--topology=v5e:2x4"]
    command += ["--config.compute_dtype=auto", "--config.mesh.fsdp=2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"]
    assert report["compute_dtype"] == "bfloat16"
    assert report["memory"]["arguments"] >= sum(report["bytes"].values())  # padded to the tiles of the device
    assert {"all-gather", "all-reduce"} <= set(report["collectives"])
