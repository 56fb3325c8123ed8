"""The manifest of a checkpoint: which files it holds, with their digests.

It is the last file written into the folder of a step and the first one deleted, so a folder without it is not a
checkpoint, even if it holds other files. It can be verified without a device and without reading an array.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

FOLDER, CORRUPT_FOLDER = "checkpoints", "corrupt"  # of a workdir
NAME = "manifest.json"  # of a step
CHUNK = 1 << 20


class CorruptCheckpointError(ValueError):
    """A checkpoint that is not what was saved; the message names the step, the file or array, and both digests."""


def write(folder: pathlib.Path, step: int) -> None:
    """Seal the folder of a step."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }
    body = {"step": step, "files": files}
    text = json.dumps({"sha256": sha256_of(body), "body": body})
    unfinished = folder / f"{NAME}.unfinished"
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(folder / NAME)


def unseal(folder: pathlib.Path) -> None:
    """Unseal a step before its deletion: the folder is no longer a checkpoint."""
    (folder / NAME).unlink(missing_ok=True)


def is_sealed(folder: pathlib.Path) -> bool:
    """True for a checkpoint, good or corrupt."""
    return (folder / NAME).is_file()


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The body of a manifest.

    Raises:
        CorruptCheckpointError: it is missing, or was changed.
    """
    path = folder / NAME
    try:
        whole = json.loads(path.read_bytes())
        body, expected = whole["body"], whole["sha256"]
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


def verify(folder: pathlib.Path) -> dict[str, Any]:
    """The body of the manifest, after every file has been compared with it.

    Raises:
        CorruptCheckpointError: the first file that is missing, too long, too short or changed.
    """
    body = read(folder)
    for name, expected in body["files"].items():
        path = folder / name
        if not path.is_file():
            raise CorruptCheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CorruptCheckpointError(f"{path} has {path.stat().st_size:,} bytes, expected {expected['bytes']:,}")
        actual = _sha256(path)
        if actual != expected["sha256"]:
            raise CorruptCheckpointError(f"{path} has the digest {actual[:16]}, expected {expected['sha256'][:16]}")
    return body


def sha256_of(body: Any) -> str:
    """The digest of a JSON value."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
