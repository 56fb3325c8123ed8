"""The trials of signals, in the slow tier."""

import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_the_run_with_75_and_it_resumes() -> None:
    script = pathlib.Path(__file__).with_name("signals.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
