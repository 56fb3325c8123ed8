"""Processes of the commands that start at once: they are forked from one that has imported everything already.

Importing TensorFlow, JAX and Orbax takes longer than what most tests want to see of a process. The one that is forked
from has touched no device and started no thread of theirs, so a fork of it is as good as a fresh start.
"""

import atexit
import contextlib
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from types import MappingProxyType

ROOT = pathlib.Path(__file__).parents[2]
ONE_DEVICE = "--xla_backend_optimization_level=0"  # what a user has, compiled quickly
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["halvit_jax.experiment.build", "halvit_jax.data", "tensorflow_datasets"])


class Started:
    """A process `python -m module arguments...`, or one that runs a program, with its output in files."""

    def __init__(
        self,
        module: str,
        *arguments: str,
        stdout: pathlib.Path,
        stderr: pathlib.Path | None = None,
        program: str = "",
        xla_flags: str = ONE_DEVICE,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        environment = {"XLA_FLAGS": xla_flags, **environment}
        job = (module, arguments, program, environment, str(stdout), str(stderr or stdout))
        self._process = _FORKS.Process(target=_child, args=job, daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 300.0) -> int:
        """The exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not.
        """
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, seconds)
        return self._process.exitcode

    def join(self, seconds: float) -> None:
        """Wait until it has ended, at most so long."""
        self._process.join(seconds)

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def run_command(
    module: str, *arguments: str, code: int = 0, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess:
    """`python -m halvit_jax.main ...` for the module "halvit_jax.main"; its exit code is as expected."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = pathlib.Path(folder, "stdout"), pathlib.Path(folder, "stderr")
        found = Started(module, *arguments, stdout=stdout, stderr=stderr, environment=environment).wait()
        done = subprocess.CompletedProcess(arguments, found, stdout.read_text(), stderr.read_text())
    assert done.returncode == code, done.stdout + done.stderr
    return done


def _child(
    module: str, arguments: tuple[str, ...], program: str, environment: Mapping[str, str], stdout: str, stderr: str
) -> None:
    os.chdir(ROOT)
    os.environ.update(environment)
    for number, path in enumerate((stdout, stderr), start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    sys.argv = [module, *arguments]
    try:
        if program:
            exec(program, {"__name__": "__main__"})
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out
