"""Checkpoints of a train state: Orbax stores them, here they are compared by parameter path before anything is read."""

import pathlib
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from halvit_jax.protocols import PyTree
from halvit_jax.training.paths import flat, map_paths

FOLDER = "checkpoints"
MOST_LISTED = 40  # differences named before the rest is only counted


class Checkpointer:
    """The checkpoints of one workdir, newest first; saving is asynchronous.

    A state is stored as nested dicts under its parameter paths, so what is on disk reads like what is in memory.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        folder = (workdir / FOLDER).absolute()
        self._manager = ocp.CheckpointManager(folder, options=options, item_handlers=ocp.StandardCheckpointHandler())
        self._saved = self._manager.latest_step()

    @property
    def latest_step(self) -> int | None:
        """The newest step there is."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree) -> None:
        """Begin to save; the arrays may be donated as soon as this returns. A step that is there is left alone."""
        if step != self._saved:
            self._manager.save(step, args=ocp.args.StandardSave(_nested(flat(state))))
            self._saved = step

    def restore(self, abstract: PyTree) -> PyTree:
        """The newest checkpoint, in the structure, types and shardings of `abstract`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the checkpoint holds other parameters; every difference is listed by path.
        """
        step = self.latest_step
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self._manager.directory}")
        saved = flat(self._manager.item_metadata(step).tree)
        wanted = flat(abstract)
        differences = compare(saved, wanted)
        if differences:
            listed = differences[:MOST_LISTED]
            if len(differences) > MOST_LISTED:
                listed.append(f"... and {len(differences) - MOST_LISTED} more")
            raise ValueError(
                f"the checkpoint of step {step} in {self._manager.directory} is of another model or optimizer; use "
                "another --workdir, or the config it was trained with:\n  " + "\n  ".join(listed)
            )
        arrays = flat(self._manager.restore(step, args=ocp.args.StandardRestore(_nested(wanted))))
        return map_paths(lambda path, _: arrays[path], abstract)

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def compare(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs between two {path: array or shape}, one line a path; empty where all fits."""
    lines = []
    for path in sorted(saved.keys() | wanted.keys()):
        if path not in wanted:
            lines.append(f"{path}: {_describe(saved[path])} saved, not in this model")
        elif path not in saved:
            lines.append(f"{path}: not saved, {_describe(wanted[path])} in this model")
        elif _describe(saved[path]) != _describe(wanted[path]):
            lines.append(f"{path}: {_describe(saved[path])} saved, {_describe(wanted[path])} in this model")
    return lines


def _describe(array: Any) -> str:
    return f"{np.dtype(array.dtype).name} {tuple(array.shape)}"


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
