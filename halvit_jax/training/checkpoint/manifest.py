"""The manifest of a checkpoint: which files it holds, with their digests.

It is the last file written into the folder of a step and the first one deleted, so a folder without it is not a
checkpoint, even if it holds other files. It can be verified without a device and without reading an array.
"""

import hashlib
import json
import os
from typing import Any

from halvit_jax import storage
from halvit_jax.buckets import BucketPath, StorageError
from halvit_jax.storage import Path

FOLDER, CORRUPT_FOLDER = "checkpoints", "corrupt"  # of a workdir
NAME = "manifest.json"  # of a step


class CorruptCheckpointError(ValueError):
    """A checkpoint that is not what was saved; the message names the step, the file or array, and both digests."""


def write(folder: Path, step: int) -> None:
    """Seal the folder of a step."""
    sizes = storage.files_below(folder)
    files = {name: {"bytes": size, "sha256": storage.sha256(folder / name)} for name, size in sizes.items()}
    body = {"step": step, "files": files}
    text = json.dumps({"sha256": sha256_of(body), "body": body})
    if isinstance(folder, BucketPath):
        storage.write_text(folder / NAME, text)
        return
    unfinished = folder / f"{NAME}.unfinished"
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(folder / NAME)


def unseal(folder: Path) -> None:
    """Unseal a step before its deletion: the folder is no longer a checkpoint."""
    (folder / NAME).unlink(missing_ok=True)


def is_sealed(folder: Path) -> bool:
    """True for a checkpoint, good or corrupt."""
    return (folder / NAME).is_file()


def read(folder: Path) -> dict[str, Any]:
    """The body of a manifest.

    Raises:
        CorruptCheckpointError: it is missing, or was changed.
        StorageError: the bucket cannot be reached.
    """
    path = folder / NAME
    try:
        whole = json.loads(path.read_bytes())
        body, expected = whole["body"], whole["sha256"]
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"{path} is missing") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {type(error).__name__}") from error
    actual = sha256_of(body)
    if actual != expected:
        raise CorruptCheckpointError(f"{path} has the digest {actual[:16]}, expected {str(expected)[:16]}")
    if str(body["step"]) != folder.name:
        raise CorruptCheckpointError(f"{path} is of step {body['step']}, not of {folder.name}")
    return body


def verify(folder: Path) -> dict[str, Any]:
    """The body of the manifest, after every file has been compared with it.

    Raises:
        CorruptCheckpointError: the first file that is missing, too long, too short or changed.
        StorageError: the bucket cannot be reached.
    """
    body = read(folder)
    sizes = storage.files_below(folder)
    for name, expected in body["files"].items():
        path = folder / name
        if name not in sizes:
            raise CorruptCheckpointError(f"{path} is missing")
        if sizes[name] != expected["bytes"]:
            raise CorruptCheckpointError(f"{path} has {sizes[name]:,} bytes, expected {expected['bytes']:,}")
        actual = storage.sha256(path)
        if actual != expected["sha256"]:
            raise CorruptCheckpointError(f"{path} has the digest {actual[:16]}, expected {expected['sha256'][:16]}")
    return body


def sha256_of(body: Any) -> str:
    """The digest of a JSON value."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
