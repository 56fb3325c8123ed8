"""Files of runs on a disk and in a bucket, and what either promises.

| promise | on a disk | in a bucket |
| --- | --- | --- |
| `write_text`: whole or not at all | a second file, renamed | one upload |
| `append_line`: lines of others stay | append | read, and write if the object is still the one that was read |
| `is_committed`: Orbax has finished the folder | it was renamed | it holds the file `COMMITTED`, its last one |
| `move_folder` | one rename | copies, then `remove_folder` |
| `remove_folder`: what is half removed is no checkpoint | the caller unseals it first | `COMMITTED` goes first too |
| no access or no answer | OSError | `StorageError`, after a wait of at most `buckets.RETRY_S` |
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from halvit_jax import buckets
from halvit_jax.buckets import SCHEME, BucketPath, ChangedError, StorageError

NEEDS = "a bucket needs google-cloud-storage: pip install 'halvit_jax[gcs]'"
COMMITTED = "commit_success.txt"  # Orbax's
CHUNK = 1 << 20
# Errors of TensorStore have one of these in their text, those of TensorFlow are of one of these classes.
NO_ANSWER = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
NO_ANSWER_TYPES = ("PermissionDeniedError", "UnauthenticatedError", "UnavailableError", "DeadlineExceededError")

Path = pathlib.Path | BucketPath


def check_scheme(text: str | os.PathLike[str], field: str = "") -> None:
    """Refuse an address that is of no bucket; `field`, such as "--workdir=", names it in the message.

    Raises:
        ValueError: it is such an address.
    """
    given = os.fspath(text)
    if "://" in given and not given.startswith(SCHEME):
        raise ValueError(f"{field}{given} must be a local path or the address of a bucket, {SCHEME}BUCKET/FOLDER")


def parse(text: str | os.PathLike[str], field: str = "") -> Path:
    """The path that a flag or field names: local, where a leading ~ is the home folder, or in a bucket.

    Raises:
        ValueError: an address of another store, one without a bucket or a folder, or google-cloud-storage is missing.
    """
    if isinstance(text, BucketPath):
        return text
    check_scheme(text, field)
    given = os.fspath(text)
    if not given.startswith(SCHEME):
        return pathlib.Path(text).expanduser()
    bucket, _, key = given.removeprefix(SCHEME).partition("/")
    if not bucket or not key.strip("/"):
        raise ValueError(f"{field}{given} must name a bucket and a folder in it, {SCHEME}BUCKET/FOLDER")
    try:
        import google.cloud.storage  # noqa: F401
    except ImportError:
        raise ValueError(f"{field}{given}: {NEEDS}") from None
    return BucketPath(bucket, pathlib.PurePosixPath(key.strip("/")))


def is_bucket(text: str | os.PathLike[str]) -> bool:
    """True for an address in a bucket."""
    return os.fspath(text).startswith(SCHEME)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, whenever the process is killed."""
    if isinstance(path, BucketPath):
        path.write_text(text)
        return
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, which is made if there is none."""
    if not isinstance(path, BucketPath):
        with path.open("a") as file:
            file.write(f"{line}\n")
        return
    while True:
        try:
            before = path.versioned()
        except FileNotFoundError:
            before = buckets.Versioned("", 0, 0.0)
        text = f"{before.text}{line}\n"
        try:
            path.write_bytes(text.encode(), generation=before.generation)
        except ChangedError:  # by another process, whose line is to stay, or by this one, whose answer was lost
            if path.read_text() != text:
                continue
        return


def files_below(folder: Path) -> dict[str, int]:
    """{path relative to the folder: bytes} of all files in it and below, sorted."""
    if isinstance(folder, BucketPath):
        return folder.sizes_below()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def sha256(path: Path) -> str:
    """The digest of a file."""
    if isinstance(path, BucketPath):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def written_at(path: Path) -> float:
    """When a file was written, in seconds since 1970."""
    return path.versioned().updated if isinstance(path, BucketPath) else path.stat().st_mtime


def is_committed(folder: Path) -> bool:
    """Whether the folder of a checkpoint is there and was finished by Orbax."""
    return (folder / COMMITTED).is_file() if isinstance(folder, BucketPath) else folder.is_dir()


def remove_folder(folder: Path, *, ignore_errors: bool = False) -> None:
    """Remove a folder and all that is in it."""
    if not isinstance(folder, BucketPath):
        shutil.rmtree(folder, ignore_errors=ignore_errors)
        return
    (folder / COMMITTED).unlink(missing_ok=True)
    folder.remove_below()


def move_file(path: Path, target: Path) -> None:
    """Give a file another name, in the place of what has it now."""
    if isinstance(path, BucketPath):
        target.write_bytes(path.read_bytes())
        path.unlink()
    else:
        path.replace(target)


def move_folder(folder: Path, target: Path) -> None:
    """Move a folder to a place in the same store where nothing is."""
    if isinstance(folder, BucketPath) and isinstance(target, BucketPath):
        folder.copy_below(target)
        remove_folder(folder)
    else:
        folder.rename(target)


def free_bytes(folder: Path) -> int | None:
    """The free space where a folder is or will be; None where there is no limit."""
    return None if isinstance(folder, BucketPath) else shutil.disk_usage(existing(folder)).free


def existing(path: pathlib.Path) -> pathlib.Path:
    """The path, or its nearest parent that exists."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[pathlib.Path]:
    """A file on the disk with the content of `path`, for a while."""
    if not isinstance(path, BucketPath):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, path.name)
        copy.write_bytes(path.read_bytes())
        yield copy


def no_answer(error: BaseException | None) -> bool:
    """Whether an error, of any library, says that a bucket refused access or did not answer.

    Such an error is no sign that an object is missing or corrupt.
    """
    while error is not None:
        if isinstance(error, StorageError) or type(error).__name__ in NO_ANSWER_TYPES:
            return True
        if any(code in str(error) for code in NO_ANSWER):
            return True
        error = error.__cause__ or error.__context__
    return False
