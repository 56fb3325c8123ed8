"""The lock on a workdir in a bucket, against a server of the storage API."""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from helpers.gcs_server import Server

from halvit_jax import storage
from halvit_jax.experiment import bucket_lock, lock
from halvit_jax.experiment.workdir import LOCK_FILE

OTHER = {"host": "elsewhere", "pid": 7, "since": "2026-01-01T00:00:00+00:00", "token": "t"}


@pytest.fixture
def workdir(server: Server, monkeypatch: pytest.MonkeyPatch) -> storage.BucketPath:
    """A workdir in a bucket whose locks beat ten times a second."""
    for name, seconds in {"BEAT_S": 0.1, "EXPIRY_S": 10.0, "POLL_S": 0.05}.items():
        monkeypatch.setattr(bucket_lock, name, seconds)
    return storage.parse(f"{server.url}/run")


def _wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20.0
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def _lock(server: Server, **changes: Any) -> None:
    server.bucket.put(f"run/{LOCK_FILE}", json.dumps(OTHER | changes).encode())


def test_a_second_run_is_refused_while_the_first_one_beats(workdir: storage.BucketPath, server: Server) -> None:
    with lock.acquire(workdir):
        first = server.bucket.objects[f"run/{LOCK_FILE}"].generation
        who = rf"--workdir=gs://bucket/run is in use by process {os.getpid()} on .* since \d{{4}}-"
        with pytest.raises(ValueError, match=who), lock.acquire(workdir):
            pass
        assert server.bucket.objects[f"run/{LOCK_FILE}"].generation > first
        assert lock.owner(workdir).startswith(f"process {os.getpid()} on ")
    assert lock.owner(workdir) == ""
    assert server.bucket.names("run/") == []


def test_the_lock_of_a_run_that_gives_no_sign_of_life_is_taken_over(
    workdir: storage.BucketPath,
    server: Server,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bucket_lock, "EXPIRY_S", 0.6)
    server.bucket.put(f"run/{LOCK_FILE}", json.dumps(OTHER).encode(), age=-5.0)  # written by a clock that is ahead
    assert lock.owner(workdir) == "process 7 on elsewhere since 2026-01-01T00:00:00+00:00"
    started = time.monotonic()
    with lock.acquire(workdir):
        assert time.monotonic() - started > bucket_lock.EXPIRY_S
        assert json.loads(server.bucket.text(f"run/{LOCK_FILE}"))["pid"] == os.getpid()
    assert "gs://bucket/run/lock.json is there; waiting for up to" in capsys.readouterr().out
    server.bucket.put(f"run/{LOCK_FILE}", json.dumps(OTHER).encode(), age=20.0)
    assert lock.owner(workdir) == ""


def test_the_lock_of_a_process_that_has_ended_on_this_machine_is_taken_over_at_once(
    workdir: storage.BucketPath, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    _lock(server, boot=bucket_lock._boot(), pid=os.getpid(), started="1")  # the number is another process's by now
    assert lock.owner(workdir) == ""
    with lock.acquire(workdir):
        pass
    _lock(server, boot=bucket_lock._boot(), pid=2**22 + 1, started="1")
    with lock.acquire(workdir):
        pass
    server.bucket.put(f"run/{LOCK_FILE}", b'{"host": "here", "pid": 7, "since": "then"}')  # copied from a disk
    assert lock.owner(workdir) == ""
    with lock.acquire(workdir):
        pass
    assert capsys.readouterr().out == ""


def test_a_lock_that_is_released_while_it_is_watched_is_taken(
    workdir: storage.BucketPath, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lock(server)
    monkeypatch.setattr(time, "sleep", lambda seconds: server.bucket.objects.pop(f"run/{LOCK_FILE}", None))
    with lock.acquire(workdir):
        assert json.loads(server.bucket.text(f"run/{LOCK_FILE}"))["pid"] == os.getpid()


def test_an_answer_that_is_lost_does_not_lock_a_run_out_of_its_own_workdir(
    workdir: storage.BucketPath, server: Server
) -> None:
    server.bucket.lost_answers = 1
    with lock.acquire(workdir):
        first = server.bucket.objects[f"run/{LOCK_FILE}"].generation
        server.bucket.lost_answers = 1
        _wait_until(lambda: server.bucket.objects[f"run/{LOCK_FILE}"].generation > first + 2)
    assert server.bucket.names("run/") == []


def test_a_run_whose_lock_was_taken_over_ends(workdir: storage.BucketPath, server: Server) -> None:
    lost: list[str] = []
    with bucket_lock.acquire(workdir / LOCK_FILE, {"pid": os.getpid()}, lost=lost.append):
        _lock(server)
        _wait_until(lambda: bool(lost))
    assert len(lost) == 1
    assert "gs://bucket/run/lock.json was taken over by another run" in lost[0]
    assert json.loads(server.bucket.text(f"run/{LOCK_FILE}"))["pid"] == 7  # it stays the other's


def test_a_bucket_without_an_answer_does_not_end_a_run_that_holds_the_lock(
    workdir: storage.BucketPath, server: Server
) -> None:
    lost: list[str] = []
    with bucket_lock.acquire(workdir / LOCK_FILE, {"pid": os.getpid()}, lost=lost.append):
        server.bucket.unavailable = 3
        _wait_until(lambda: server.bucket.unavailable == 0)
    assert lost == []


def test_the_lock_is_refused_where_the_bucket_forbids_it(workdir: storage.BucketPath, server: Server) -> None:
    server.bucket.forbidden = ("POST",)
    with (
        pytest.raises(storage.StorageError, match=r"gs://bucket/run/lock.json cannot be reached"),
        lock.acquire(workdir),
    ):
        pass
