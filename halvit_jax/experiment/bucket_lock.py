"""A lock on a workdir in a bucket, which has neither links nor locks of files.

The lock is an object that is created on the condition that there is none. Its holder writes it again every `BEAT_S`
seconds, each time on the condition that nobody else has. A run that finds the lock of another one watches it: if the
object changes, that run is alive. If it stays the same for `EXPIRY_S` seconds, or the record shows that its process
was on this machine and has ended, the lock is taken over, on the condition that it is still the same object. No clock
is compared with another.

A holder that was away for so long that its lock was taken over ends at its next beat, so that two runs do not write.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from halvit_jax.buckets import BucketPath, ChangedError, StorageError, Versioned
from halvit_jax.protocols import ExitCode

BEAT_S = 10.0  # between two signs of life
EXPIRY_S = 60.0  # without a sign of life, after which a lock is taken over
POLL_S = 1.0  # between two looks at the lock of another run


@contextlib.contextmanager
def acquire(
    path: BucketPath,
    record: dict[str, Any],
    *,
    log: Callable[[str], None] = print,
    lost: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold the lock that is the object `path`; `record` tells others who does.

    Raises:
        HeldError: another run holds it.
        StorageError: the bucket cannot be reached.
    """
    text = json.dumps(record | _process() | {"token": uuid.uuid4().hex}) + "\n"
    generation = _create(path, text, log)
    over = threading.Event()
    holder = _Holder(path, text, generation, lost or _end)
    thread = threading.Thread(target=holder.beat_until, args=(over,), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(ChangedError, StorageError):  # then it expires
            path.unlink(missing_ok=True, generation=holder.generation)


class HeldError(ValueError):
    """The lock is held by another run, whose record is the only argument."""


def read(path: BucketPath) -> str | None:
    """The record of the run that holds the lock; None if none does, as far as this machine's clock can tell."""
    try:
        found = path.versioned()
    except FileNotFoundError:
        return None
    expired = time.time() - found.updated > EXPIRY_S
    return None if expired or _has_ended(found.text) else found.text


class _Holder:
    """Writes the lock again and again; `lost` is called when another run has it."""

    def __init__(self, path: BucketPath, text: str, generation: int, lost: Callable[[str], None]) -> None:
        self.generation = generation
        self._path, self._text, self._lost = path, text, lost

    def beat_until(self, over: threading.Event) -> None:
        while not over.wait(BEAT_S):
            try:
                self.generation = _write(self._path, self._text, self.generation, retry_s=BEAT_S)
            except StorageError:
                continue  # what the run itself writes will say so
            except ChangedError:
                self._lost(f"the lock {self._path} was taken over by another run, after this one was away for too long")
                return


def _create(path: BucketPath, text: str, log: Callable[[str], None]) -> int:
    """Create the lock, or take over that of a run that has ended; the generation of the object."""
    while True:
        with contextlib.suppress(ChangedError):
            return _write(path, text, 0)
        try:
            found = path.versioned()
        except FileNotFoundError:  # released since
            continue
        if not _has_ended(found.text):
            log(f"{path} is there; waiting for up to {EXPIRY_S:.0f} s to see whether its run is alive")
            if not _stays(path, found):
                continue
        with contextlib.suppress(ChangedError):  # another run was faster
            return _write(path, text, found.generation)


def _stays(path: BucketPath, found: Versioned) -> bool:
    """Whether a lock stays as it is for `EXPIRY_S` seconds; False if it was released.

    Raises:
        HeldError: it changes, so that its run is alive.
    """
    end = time.monotonic() + EXPIRY_S
    while time.monotonic() < end:
        time.sleep(POLL_S)
        try:
            now = path.versioned()
        except FileNotFoundError:
            return False
        if now.generation != found.generation:
            raise HeldError(now.text)
    return True


def _write(path: BucketPath, text: str, generation: int, **how: Any) -> int:
    """Write the lock if it has this generation; its new one.

    Raises:
        ChangedError: it has another one, and is not ours.
    """
    try:
        return path.write_bytes(text.encode(), generation=generation, **how)
    except ChangedError:
        with contextlib.suppress(FileNotFoundError):
            now = path.versioned()
            if now.text == text:  # written, but the answer was lost
                return now.generation
        raise


def _process() -> dict[str, Any]:
    """What tells this process from all others of this machine; nothing where the system does not say."""
    with contextlib.suppress(OSError):
        return {"boot": _boot(), "started": _started(os.getpid())}
    return {}


def _has_ended(text: str) -> bool:
    """Whether the process of a record was on this machine, since its last start, and is no more.

    So has that of a record without a token: it was copied from a disk, where the system holds the lock.
    """
    try:
        record = json.loads(text)
        if "token" not in record:
            return True
        if record["boot"] != _boot():
            return False
    except (ValueError, KeyError, OSError):
        return False
    try:
        return _started(record["pid"]) != record["started"]
    except OSError:
        return True


def _boot() -> str:
    """The start of this machine, and the space of process ids, of which a container has its own."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str:
    """When a process was started, in ticks since the start of the machine."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]


def _end(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(ExitCode.FATAL_RUN)
