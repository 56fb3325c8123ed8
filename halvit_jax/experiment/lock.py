"""One run at a time in a workdir."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator

FILE = "lock.json"


@contextlib.contextmanager
def acquire(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a workdir. The system releases it when the process ends, however that happens, so a lock file
    that is left behind locks nothing.

    Raises:
        ValueError: another run holds it; the message says which, where, and since when.
    """
    with (workdir / FILE).open("a+") as file:
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
    """Who holds the lock of a workdir, as "process 7 on host since ..."; "" where nobody does. Writes nothing."""
    try:
        with (workdir / FILE).open() as file:
            try:  # shared, and given back at once
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
