"""What a checkpoint says of its arrays, and how that differs from what a run wants."""

from typing import Any

import numpy as np

from halvit_jax.training.checkpoint.digests import digests


def compare(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs between {path: entry of the metadata} and {path: array or shape}, one line a path."""
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


def described(leaves: dict[str, Any]) -> dict[str, Any]:
    """What is saved beside the arrays: {path: {"dtype", "shape", "digest"}}."""
    return {
        path: {"dtype": np.dtype(leaves[path].dtype).name, "shape": list(leaves[path].shape), "digest": digest}
        for path, digest in digests(leaves).items()
    }


def another_model(step: int, where: Any, differences: list[str]) -> str:
    """What to say of a checkpoint that differs."""
    return (
        f"the checkpoint of step {step} in {where} is of another model or optimizer; use another --workdir, or the "
        "config it was trained with:\n  " + "\n  ".join(differences)
    )
