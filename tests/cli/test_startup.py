"""Signals before the run listens to them itself."""

import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers.processes import ROOT

from halvit_jax.cli import startup
from halvit_jax.protocols import ExitCode


def test_the_exit_code_is_that_of_a_preemption() -> None:
    assert startup.PREEMPTED == ExitCode.PREEMPTED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_imports_ends_the_run_with_75_and_one_line(
    number: signal.Signals, tmp_path: pathlib.Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "halvit_jax.main",
        "--config=configs/halvit_digits.py",
        f"--workdir={tmp_path}/run",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status, maps = (pathlib.Path(f"/proc/{process.pid}/{name}") for name in ("status", "maps"))
    deadline = time.monotonic() + 60
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1:
        assert "jaxlib" not in maps.read_text()  # listened to before anything slow
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (75, "")
    assert out == f"stopped by {number.name}: nothing had to be saved; the same command starts again\n"
    assert not (tmp_path / "run").exists()


def test_signals_are_ignored_once_all_is_written() -> None:
    program = (
        "import os, signal; from halvit_jax.cli import startup; startup.exit_on_signals(); startup.ignore_signals();"
        "[os.kill(os.getpid(), number) for number in (signal.SIGTERM, signal.SIGINT)]"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
