"""A lock on a workdir, for one training run at a time."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator

from halvit_jax.buckets import BucketPath
from halvit_jax.experiment import bucket_lock
from halvit_jax.experiment.workdir import LOCK_FILE
from halvit_jax.storage import Path


@contextlib.contextmanager
def acquire(workdir: Path) -> Iterator[None]:
    """Hold the lock of a workdir. The system releases it when the process ends, so a stale file locks nothing.

    In a bucket it is that of `bucket_lock`.

    Raises:
        ValueError: another run holds it; the message names its process, host and start.
    """
    if isinstance(workdir, BucketPath):
        try:
            with bucket_lock.acquire(workdir / LOCK_FILE, _record()):
                yield
        except bucket_lock.HeldError as error:
            raise ValueError(_in_use(workdir, str(error))) from error
        return
    with (workdir / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise ValueError(_in_use(workdir, file.read())) from error
        file.truncate(0)
        file.write(json.dumps(_record()) + "\n")
        file.flush()
        yield


def owner(workdir: Path) -> str:
    """The process that holds the lock, as "process 7 on HOST since ...", "" if none does. Writes nothing."""
    if isinstance(workdir, BucketPath):
        record = bucket_lock.read(workdir / LOCK_FILE)
        return "" if record is None else _owner(record)
    try:
        with (workdir / LOCK_FILE).open() as file:
            try:  # a shared lock, released immediately
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _owner(file.read())
    except (FileNotFoundError, NotADirectoryError):
        pass
    return ""


def _record() -> dict[str, str | int]:
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now}


def _in_use(workdir: Path, record: str) -> str:
    return f"--workdir={workdir} is in use by {_owner(record)}; wait for it, or name another one"


def _owner(text: str) -> str:
    try:
        return "process {pid} on {host} since {since}".format(**json.loads(text))
    except (ValueError, KeyError):
        return "another run"
