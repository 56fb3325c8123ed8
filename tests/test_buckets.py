"""A bucket's objects with the methods of a path, against a server of the storage API."""

import gc
import pathlib
from typing import Any

import pytest
from helpers.gcs_server import Server

from halvit_jax import buckets
from halvit_jax.buckets import BucketPath, ChangedError, StorageError


@pytest.fixture
def run(server: Server) -> BucketPath:
    """A folder with five objects, in a bucket whose listings have two entries a page."""
    server.bucket.page = 2
    folder = BucketPath("bucket", pathlib.PurePosixPath("runs/a"))
    for name in ("config.json", "checkpoints/", "checkpoints/4/array", "checkpoints/8/array", "checkpoints/12/array"):
        server.bucket.put(f"runs/a/{name}", b"" if name.endswith("/") else name.encode())
    return folder


def test_a_path_in_a_bucket_is_taken_apart_and_put_together_as_a_path() -> None:
    path = BucketPath("bucket", pathlib.PurePosixPath("runs/a")) / "b/config.json"
    assert str(path) == "gs://bucket/runs/a/b/config.json"
    assert (path.name, path.suffix, path.absolute()) == ("config.json", ".json", path)
    assert str(path.with_suffix(".step_8.json")) == "gs://bucket/runs/a/b/config.step_8.json"
    assert sorted([path / "b", path / "a"])[0].name == "a"
    assert str(path.relative_to(BucketPath("bucket", pathlib.PurePosixPath("runs")))) == "a/b/config.json"


def test_every_page_of_a_listing_is_read_and_markers_of_folders_are_no_files(run: BucketPath) -> None:
    steps = run / "checkpoints"
    assert [path.name for path in run.iterdir()] == ["checkpoints", "config.json"]
    assert [path.name for path in steps.iterdir()] == ["12", "4", "8"]
    assert [path.name for path in steps.glob("1*")] == ["12"]
    assert run.sizes_below() == {f"checkpoints/{step}/array": 19 + (step > 9) for step in (12, 4, 8)} | {
        "config.json": 11
    }


def test_a_folder_is_there_as_long_as_an_object_is_in_it(run: BucketPath) -> None:
    folder = run / "checkpoints/8"
    folder.mkdir(parents=True, exist_ok=True)
    assert (folder.is_dir(), folder.is_file(), folder.exists()) == (True, False, True)
    assert ((folder / "array").is_dir(), (folder / "array").is_file()) == (False, True)
    folder.remove_below()
    assert not folder.exists()
    assert (run / "checkpoints").is_dir()
    assert not (run / "check").exists()  # which begins like a folder


def test_all_objects_of_a_folder_are_copied(run: BucketPath, server: Server) -> None:
    (run / "checkpoints").copy_below(run / "corrupt")
    assert server.bucket.names("runs/a/corrupt/") == [f"runs/a/corrupt/{step}/array" for step in (12, 4, 8)]
    assert (run / "corrupt/8/array").read_text() == "checkpoints/8/array"


def test_an_object_is_written_only_if_it_is_still_the_one_that_was_read(run: BucketPath) -> None:
    path = run / "lock.json"
    first = path.write_bytes(b"one", generation=0)
    with pytest.raises(ChangedError, match=r"gs://bucket/runs/a/lock.json was changed"):
        path.write_bytes(b"two", generation=0)
    assert path.write_bytes(b"two", generation=first) > first
    with pytest.raises(ChangedError, match=r"lock.json"):
        path.unlink(generation=first)
    found = path.versioned()
    assert found.text == "two"
    path.unlink(generation=found.generation)
    path.unlink(missing_ok=True)
    for read in (path.read_text, path.versioned, path.unlink):
        with pytest.raises(FileNotFoundError, match=r"gs://bucket/runs/a/lock.json does not exist"):
            read()


def test_an_object_that_changes_while_it_is_read_is_read_again(
    run: BucketPath, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from google.cloud.storage import Blob

    reload = Blob.reload

    def and_another_writes(self: Any, **how: Any) -> None:
        monkeypatch.setattr(Blob, "reload", reload)
        reload(self, **how)
        server.bucket.put("runs/a/config.json", b"new")

    monkeypatch.setattr(Blob, "reload", and_another_writes)
    found = (run / "config.json").versioned()
    assert (found.text, found.generation) == ("new", server.bucket.objects["runs/a/config.json"].generation)


# Of downloads that are repeated, google-cloud-storage leaves each connection but the last to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_request_is_repeated_while_the_bucket_does_not_answer_and_the_wait_ends(
    run: BucketPath, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.bucket.unavailable = 1
    (run / "config.json").write_text("new")
    assert server.bucket.text("runs/a/config.json") == "new"
    monkeypatch.setattr(buckets, "RETRY_S", 0.5)
    for use in (run.is_dir, lambda: list(run.iterdir()), (run / "config.json").read_text):
        server.bucket.unavailable = 1000
        with pytest.raises(StorageError, match=r"gs://bucket/runs/a.* cannot be reached: .*503"):
            use()
    gc.collect()


def test_a_lost_permission_is_no_missing_object(run: BucketPath, server: Server) -> None:
    server.bucket.forbidden = ("GET", "POST", "DELETE")
    path = run / "config.json"
    for use in (path.is_file, path.read_bytes, lambda: path.write_bytes(b""), path.unlink, run.remove_below):
        with pytest.raises(StorageError, match=r"gs://bucket/runs/a.* cannot be reached: .*permission"):
            use()


def test_missing_credentials_are_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere.json")
    with pytest.raises(StorageError, match=r"gs://bucket/runs cannot be reached: .*/nowhere.json was not found"):
        BucketPath("bucket", pathlib.PurePosixPath("runs")).exists()
