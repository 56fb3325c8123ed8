"""Array metadata of a checkpoint, and its diff against the expected state."""

from typing import Any

import numpy as np

from halvit_jax.training.checkpoint.digests import digests


def diff(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The differences between {path: entry of the metadata} and {path: array or shape}, one line a path."""
    lines = []
    for path in sorted(saved.keys() | wanted.keys()):
        before = f"{saved[path]['dtype']} {tuple(saved[path]['shape'])}" if path in saved else ""
        now = f"{np.dtype(wanted[path].dtype).name} {tuple(wanted[path].shape)}" if path in wanted else ""
        if not now:
            lines.append(f"{path}: {before} saved, not in this model")
        elif not before:
            lines.append(f"{path}: not saved, {now} in this model")
        elif before != now:
            lines.append(f"{path}: {before} saved, {now} in this model")
    return lines


def array_metadata(leaves: dict[str, Any]) -> dict[str, Any]:
    """The metadata of arrays: {path: {"dtype", "shape", "digest"}}."""
    return {
        path: {"dtype": np.dtype(leaves[path].dtype).name, "shape": list(leaves[path].shape), "digest": digest}
        for path, digest in digests(leaves).items()
    }


class MismatchError(ValueError):
    """A checkpoint of another model or optimizer; every difference is listed by path."""


def mismatch_message(step: int, where: Any, differences: list[str]) -> str:
    """The message about a checkpoint that differs."""
    return (
        f"the checkpoint of step {step} in {where} is of another model or optimizer; use another --workdir, or the "
        "config it was trained with:\n  " + "\n  ".join(differences)
    )
