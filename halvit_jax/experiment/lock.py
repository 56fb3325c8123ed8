"""A lock on a workdir, for one training run at a time."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator

from halvit_jax.experiment.workdir import LOCK_FILE


@contextlib.contextmanager
def acquire(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a workdir. The system releases it when the process ends, so a stale file locks nothing.

    Raises:
        ValueError: another run holds it; the message names its process, host and start.
    """
    with (workdir / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise ValueError(
                f"--workdir={workdir} is in use by {_owner(file.read())}; wait for it, or name another one"
            ) from error
        file.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}) + "\n")
        file.flush()
        yield


def owner(workdir: pathlib.Path) -> str:
    """The process that holds the lock, as "process 7 on HOST since ...", "" if none does. Writes nothing."""
    try:
        with (workdir / LOCK_FILE).open() as file:
            try:  # a shared lock, released immediately
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _owner(file.read())
    except (FileNotFoundError, NotADirectoryError):
        pass
    return ""


def _owner(text: str) -> str:
    try:
        return "process {pid} on {host} since {since}".format(**json.loads(text))
    except (ValueError, KeyError):
        return "another run"
