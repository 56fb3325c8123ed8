import pathlib
import subprocess
import sys
import time

import pytest

from halvit_jax.protocols import ExitCode

PROGRAM = """
import pathlib, sys, time
from halvit_jax.training.fault_tolerance.watchdog import COMPILING, Watchdog

def diagnose_peers(line, *, step, waiting):
    return f"asked about: {line} ({step}, {waiting})"

dog = Watchdog(
    pathlib.Path(sys.argv[1]), timeout=1.0, compile_timeout=4.0, name="rank 1 of 2: ", diagnose_peers=diagnose_peers
)
dog.start()
dog.heartbeat(COMPILING, 3)
time.sleep(3)  # three times the timeout
for step in range(3, 6):
    dog.heartbeat("training", step)
    time.sleep(0.4)
print("stuck from here", flush=True)
def deep_inside():
    time.sleep(60)
if sys.argv[2] == "hang":
    deep_inside()
dog.stop()
time.sleep(2)
print("ended by itself")
"""


def _run(folder: pathlib.Path, what: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, str(folder), what]
    return subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)


def test_a_run_that_does_not_move_ends_with_the_stacks_of_its_threads(tmp_path: pathlib.Path) -> None:
    started = time.monotonic()
    done = _run(tmp_path / "debug", "hang")
    assert time.monotonic() - started < 30
    assert (done.returncode, done.stdout) == (ExitCode.STALLED, "stuck from here\n"), done.stderr
    line = "rank 1 of 2: no progress for 1 s in phase 'training' after step 5"
    assert f"error: {line}; the stacks" in done.stderr
    assert f"asked about: {line} (5, True)" in done.stderr
    (file,) = (tmp_path / "debug").iterdir()
    for text in (done.stderr, file.read_text()):
        assert line in text
        assert "in deep_inside" in text


@pytest.mark.slow  # a process of its own
def test_compiling_may_take_longer_and_a_stopped_dog_does_not_bite(tmp_path: pathlib.Path) -> None:
    done = _run(tmp_path / "debug", "end")
    assert (done.returncode, done.stdout) == (0, "stuck from here\nended by itself\n"), done.stderr
    assert not (tmp_path / "debug").exists()
