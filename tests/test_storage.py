"""What disks and buckets promise; each test of a promise runs on both."""

import pathlib
import sys

import pytest
from helpers.gcs_server import Server

from halvit_jax import storage
from halvit_jax.buckets import StorageError


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> storage.Path:
    """A folder on a disk, and one in a bucket."""
    if request.param == "disk":
        return tmp_path
    return storage.parse(f"{request.getfixturevalue('server').url}/runs/a")


@pytest.mark.parametrize("given", ["s3://bucket/run", "az://bucket/run", "hf://me/run", "https://host/run"])
def test_an_address_of_another_store_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=rf"--workdir={given} must be a local path or .*gs://BUCKET/FOLDER"):
        storage.parse(given, "--workdir=")


@pytest.mark.parametrize("given", ["gs://", "gs://bucket", "gs://bucket/", "gs:///run"])
def test_an_address_without_a_bucket_or_a_folder_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=rf"--workdir={given} must name a bucket and a folder in it"):
        storage.parse(given, "--workdir=")


def test_without_the_extra_a_bucket_is_refused_with_the_command_that_adds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("google.cloud.storage")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    message = r"init_from=gs://bucket/run: .*pip install 'halvit_jax\[gcs\]'"
    with pytest.raises(ValueError, match=message):
        storage.parse("gs://bucket/run", "init_from=")


def test_a_local_path_is_as_it_is_given_and_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.parse("~/runs/a") == pathlib.Path("/home/someone/runs/a")
    assert storage.parse("runs/a") == pathlib.Path("runs/a")


def test_an_address_is_parsed_once_and_again(server: Server) -> None:
    path = storage.parse(f"{server.url}/runs//a/")
    assert str(path) == "gs://bucket/runs/a"
    assert storage.parse(path) is path
    assert (storage.is_bucket(path), storage.is_bucket("runs/a")) == (True, False)


def test_a_file_is_written_whole_and_lines_are_added(folder: storage.Path) -> None:
    storage.write_text(folder / "config.json", "{}\n")
    for line in ("one", "two"):
        storage.append_line(folder / "evals.jsonl", line)
    assert (folder / "evals.jsonl").read_text() == "one\ntwo\n"
    assert storage.files_below(folder) == {"config.json": 3, "evals.jsonl": 8}
    assert storage.written_at(folder / "config.json") <= storage.written_at(folder / "evals.jsonl") + 0.1


def test_a_line_of_another_process_stays_and_one_whose_answer_is_lost_is_not_added_twice(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = storage.parse(f"{server.url}/runs/evals.jsonl")
    read = type(path).versioned

    def and_another_writes(self: storage.BucketPath) -> object:
        monkeypatch.setattr(type(path), "versioned", read)
        found = read(self)
        server.bucket.put("runs/evals.jsonl", b"one\nother\n")
        return found

    storage.append_line(path, "one")
    monkeypatch.setattr(type(path), "versioned", and_another_writes)
    server.bucket.lost_answers = 1
    storage.append_line(path, "two")
    assert path.read_text() == "one\nother\ntwo\n"


def test_a_digest_and_a_local_copy_are_of_the_content(folder: storage.Path) -> None:
    (folder / "array").write_bytes(b"abc")
    assert storage.sha256(folder / "array").startswith("ba7816bf8f01cfea")
    with storage.local_copy(folder / "array") as copy:
        assert (copy.name, copy.read_bytes()) == ("array", b"abc")


def test_a_file_gets_another_name(folder: storage.Path) -> None:
    for name in ("old", "new"):
        (folder / name).write_bytes(name.encode())
    storage.move_file(folder / "old", folder / "new")
    assert storage.files_below(folder) == {"new": 3}
    assert (folder / "new").read_bytes() == b"old"


def test_a_folder_is_moved_and_removed(folder: storage.Path) -> None:
    (folder / "4/default").mkdir(parents=True)
    for name in ("4/default/array", f"4/{storage.COMMITTED}"):
        (folder / name).write_bytes(b"abc")
    assert storage.is_committed(folder / "4")
    storage.move_folder(folder / "4", folder / "8")
    assert not storage.is_committed(folder / "4")
    assert storage.files_below(folder) == {f"8/{storage.COMMITTED}": 3, "8/default/array": 3}
    storage.remove_folder(folder / "8")
    assert not storage.is_committed(folder / "8")
    assert storage.files_below(folder) == {}


def test_what_a_killed_run_has_half_removed_in_a_bucket_is_no_checkpoint(server: Server) -> None:
    folder = storage.parse(f"{server.url}/checkpoints/4")
    for name in ("array", storage.COMMITTED):
        (folder / name).write_bytes(b"abc")
    server.bucket.requests.clear()
    storage.remove_folder(folder)
    deleted = [line for line in server.bucket.requests if line.startswith("DELETE")]
    assert [storage.COMMITTED in line for line in deleted] == [True, False]


def test_a_disk_has_a_limit_and_a_bucket_none(folder: storage.Path) -> None:
    free = storage.free_bytes(folder / "not/yet")
    assert free is None if storage.is_bucket(folder) else free > 0


def test_errors_of_every_client_tell_a_bucket_without_an_answer_from_a_corrupt_file() -> None:
    unavailable = type("UnavailableError", (Exception,), {})
    assert storage.no_answer(StorageError("gs://bucket/run cannot be reached"))
    assert storage.no_answer(ValueError('PERMISSION_DENIED: Error opening "zarr3" driver'))
    error = KeyError("metadata")
    error.__cause__ = unavailable("503")
    assert storage.no_answer(error)
    assert not storage.no_answer(ValueError("NOT_FOUND: no such array"))
