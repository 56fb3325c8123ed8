"""Objects and folders in a bucket of Google Cloud Storage, with the methods of `pathlib.Path` that a bucket can keep.

Our own files in a bucket are read and written with google-cloud-storage (the extra `gcs`), which has conditions on
generations, lists a folder in one request and raises errors of its own. Orbax, TFDS and TensorBoard reach the same
bucket by its address, through etils.epath, TensorStore and TensorFlow.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from halvit_jax.text import one_line

SCHEME = "gs://"
RETRY_S = 120.0  # for how long a request that fails is repeated
REQUEST_S = 60.0  # for how long one request may take


class StorageError(OSError):
    """A bucket that refuses access or does not answer; it says nothing about the content of its objects."""


class ChangedError(OSError):
    """An object is no longer the one that was read, because another process has written it."""


class Versioned(NamedTuple):
    """The content of an object, its generation, and when the bucket wrote it, in seconds since 1970."""

    text: str
    generation: int
    updated: float


@dataclasses.dataclass(frozen=True, order=True)
class BucketPath(os.PathLike[str]):
    """An object or a folder in a bucket, with the methods of `pathlib.Path` that a bucket can keep.

    A folder is there as long as an object is in it. `rename` and `open` are missing: no bucket has them.

    Raises:
        StorageError: by every method that asks the bucket, if that refuses or does not answer.
    """

    bucket: str
    key: pathlib.PurePosixPath

    def __fspath__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}"

    def __str__(self) -> str:
        return os.fspath(self)

    def __truediv__(self, name: str | os.PathLike[str]) -> "BucketPath":
        return dataclasses.replace(self, key=self.key / name)

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def suffix(self) -> str:
        return self.key.suffix

    def with_suffix(self, suffix: str) -> "BucketPath":
        return dataclasses.replace(self, key=self.key.with_suffix(suffix))

    def relative_to(self, other: "BucketPath") -> pathlib.PurePosixPath:
        return self.key.relative_to(other.key)

    def absolute(self) -> "BucketPath":
        return self

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing to do: a folder begins with its first object."""

    def is_file(self) -> bool:
        with _reported(self):
            return self._blob().exists(**_how())

    def is_dir(self) -> bool:
        with _reported(self):
            return any(True for _ in client().list_blobs(self.bucket, prefix=f"{self.key}/", max_results=1, **_how()))

    def exists(self) -> bool:
        return self.is_dir() or self.is_file()

    def iterdir(self) -> "Iterator[BucketPath]":
        with _reported(self):
            found = client().list_blobs(self.bucket, prefix=f"{self.key}/", delimiter="/", **_how())
            names = [pathlib.PurePosixPath(blob.name).name for blob in found if not blob.name.endswith("/")]
            names += [pathlib.PurePosixPath(prefix).name for prefix in found.prefixes]
        return iter([self / name for name in sorted(set(names))])

    def glob(self, pattern: str) -> "Iterator[BucketPath]":
        """Those of `iterdir` whose name fits."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def read_bytes(self) -> bytes:
        with _reported(self):
            return self._blob().download_as_bytes(**_how())

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes, *, generation: int | None = None, retry_s: float | None = None) -> int:
        """Write an object whole, and return its generation.

        With a `generation` only if the object still has that one, and with 0 only if there is none.

        Raises:
            ChangedError: it has another one.
        """
        with _reported(self):
            blob = self._blob()
            blob.upload_from_string(data, if_generation_match=generation, **_how(retry_s))
            return int(blob.generation)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def versioned(self) -> Versioned:
        """The content of an object, its generation, and when the bucket wrote it.

        Raises:
            FileNotFoundError: there is none.
        """
        while True:
            with contextlib.suppress(ChangedError), _reported(self):  # by another process, between the two requests
                blob = self._blob()
                blob.reload(**_how())
                content = blob.download_as_bytes(if_generation_match=blob.generation, **_how())
                return Versioned(content.decode(), int(blob.generation), blob.updated.timestamp())

    def sizes_below(self) -> dict[str, int]:
        """{path relative to this folder: bytes} of all objects below it, sorted; of all pages of the listing."""
        prefix = f"{self.key}/"
        with _reported(self):
            found = {blob.name: int(blob.size) for blob in client().list_blobs(self.bucket, prefix=prefix, **_how())}
        return {name.removeprefix(prefix): found[name] for name in sorted(found) if not name.endswith("/")}

    def remove_below(self) -> None:
        """Delete all objects of this folder."""
        with _reported(self):
            found = list(client().list_blobs(self.bucket, prefix=f"{self.key}/", **_how()))
        for blob in found:
            with contextlib.suppress(FileNotFoundError), _reported(self):
                blob.delete(**_how())

    def copy_below(self, target: "BucketPath") -> None:
        """Copy all objects of this folder into another, on the server."""
        for name in self.sizes_below():
            with _reported(self / name):
                source, copy = (self / name)._blob(), (target / name)._blob()
                token, *_ = copy.rewrite(source, **_how())
                while token:  # a large object is copied in parts
                    token, *_ = copy.rewrite(source, token=token, **_how())

    def unlink(self, *, missing_ok: bool = False, generation: int | None = None) -> None:
        """Delete an object; with a `generation` only if it still has that one."""
        try:
            with _reported(self):
                self._blob().delete(if_generation_match=generation, **_how())
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _blob(self) -> Any:
        return client().bucket(self.bucket).blob(str(self.key))


@contextlib.contextmanager
def _reported(path: BucketPath) -> Iterator[None]:
    """Raise errors of the client as OSError, each on one line that names the object."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (exceptions.GoogleAPIError, GoogleAuthError, OSError) as error:
        for cause in (error, error.__cause__):  # of a download, whose connection the client leaves open
            if getattr(cause, "response", None) is not None:
                cause.response.close()
        if isinstance(error, exceptions.NotFound):
            raise FileNotFoundError(f"{path} does not exist") from error
        if isinstance(error, exceptions.PreconditionFailed):
            raise ChangedError(f"{path} was changed by another process") from error
        raise StorageError(f"{path} cannot be reached: {one_line(error)}") from error


def _how(retry_s: float | None = None) -> dict[str, Any]:
    """The waits of a request, each of which ends."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    retry_s = RETRY_S if retry_s is None else retry_s
    return {"timeout": min(REQUEST_S, retry_s), "retry": DEFAULT_RETRY.with_timeout(retry_s)}


@functools.lru_cache(maxsize=1)
def client() -> Any:
    """The client of this process."""
    from google.cloud import storage

    return storage.Client()
