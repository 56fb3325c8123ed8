"""Checkpoints of a train state: Orbax stores them; this file seals, verifies, compares, keeps and deletes them.

A checkpoint is the folder of its step. Orbax commits it, with a digest of every array in its metadata; then a manifest
with a digest of every file seals it. A restored checkpoint has passed both. If the newest step does not pass, the error
is logged and the step before it is restored. A folder that was committed but not sealed, because the run ended in
between, passes by its arrays alone. In a bucket, the folder of a step may be one that Orbax has not committed; such a
folder is no checkpoint, and the next run removes it.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from halvit_jax import storage
from halvit_jax.buckets import StorageError
from halvit_jax.protocols import PyTree
from halvit_jax.storage import Path
from halvit_jax.text import one_line
from halvit_jax.training.checkpoint import manifest
from halvit_jax.training.checkpoint.digests import digests
from halvit_jax.training.checkpoint.manifest import CORRUPT_FOLDER, FOLDER, CorruptCheckpointError
from halvit_jax.training.checkpoint.metadata import MismatchError, array_metadata, diff, mismatch_message
from halvit_jax.training.sharding import broadcast_from_process_0, bytes_of
from halvit_jax.training.state import OPTIONAL_PARTS, begin_part
from halvit_jax.trees import flatten, map_paths, unflatten

BEST = "best"  # the step with the best score
MAX_LISTED = 40  # differences named before the rest is only counted
MAX_STEPS = 256  # checkpoints considered


class SaveError(OSError):
    """A checkpoint could not be written in `attempts` attempts."""


class Restored(NamedTuple):
    """A verified state, its step, the metadata saved with it, and one line for each corrupt step that was skipped."""

    state: PyTree
    step: int
    metadata: dict[str, Any]
    corrupt: dict[int, str]


class Checkpointer:
    """The checkpoints of one workdir. Saving is asynchronous; at most one save is in flight.

    `keep` is how many of the newest checkpoints to keep, `keep_best` how many of those with the best scores beside
    them. `attempts` is how many saves in a row may fail. `log` gets a line for each failure, and for each corrupt step
    that is skipped.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int = 2,
        keep_best: int = 1,
        attempts: int = 1,
        timeout: int = 600,
        log: Callable[[str], None] = print,
        read_only: bool = False,
    ) -> None:
        self._folder = (workdir / FOLDER).absolute()
        self._quarantine = (workdir / CORRUPT_FOLDER).absolute()
        self._keep_best = keep_best
        self._keep, self._attempts, self._timeout, self._log = keep, attempts, timeout, log
        self._read_only = read_only
        logging.getLogger("absl").addFilter(_not_of_orbax)
        self._complete_copies()
        self._manager = self._new_manager()
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._sealing: Future[None] | None = None
        self._failures = 0
        self._saved: int | None = None  # the newest step that is saved or being saved
        self._needed = 0  # bytes of a state

    def steps(self) -> list[int]:
        """The steps that have a committed folder, in order; process 0 lists them for all."""
        newest = sorted(step for step, folder in self._folders().items() if storage.is_committed(folder))[-MAX_STEPS:]
        agreed = broadcast_from_process_0(np.array([-1] * (MAX_STEPS - len(newest)) + newest, np.int32))
        return [int(step) for step in agreed if step >= 0]

    def restore(self, abstract: PyTree, *, step: int | str | None = None) -> Restored | None:
        """The newest checkpoint that verifies (or that of `step` alone, which may be BEST); None if there is none.

        It has the structure, types and shardings of `abstract`. Of the parts that a run can switch on and off, one that
        the checkpoint lacks starts anew, and one that `abstract` lacks is dropped.

        Raises:
            CorruptCheckpointError: there are checkpoints, and none verifies; or that of `step` does not.
            MismatchError: the checkpoint holds other parameters, every difference listed by path.
            ValueError: `step` is not there.
        """
        steps = self.steps()
        if step == BEST:
            step = next(iter(self._ranked(steps)), None)
            if step is None:
                raise ValueError(f"--step={BEST}: no checkpoint in {self._folder} was evaluated when it was saved")
        if step is not None and step not in steps:
            raise ValueError(f"no checkpoint of step {step} in {self._folder}, which has {_listed(steps)}")
        corrupt: dict[int, str] = {}
        for candidate in [step] if step is not None else reversed(steps):
            try:
                state, metadata = self._restore(candidate, abstract)
            except CorruptCheckpointError as error:
                corrupt[candidate] = f"the checkpoint of step {candidate} is corrupt: {error}"
            else:
                self._saved = candidate
                for line in corrupt.values():
                    self._log(f"WARNING: {line}; skipped")
                return Restored(state, candidate, metadata, corrupt)
        if corrupt:
            raise CorruptCheckpointError("; ".join(corrupt.values()))
        return None

    def quarantine(self, steps: list[int]) -> None:
        """Move the folders of corrupt steps away, because the run will save these steps again."""
        if steps and jax.process_index() == 0:
            self._quarantine.mkdir(exist_ok=True)
            for step in steps:
                taken = sum(path.name.split(".")[0] == str(step) for path in self._quarantine.iterdir())
                name = f"{step}.{taken}" if taken else str(step)
                storage.move_folder(self._folder / str(step), self._quarantine / name)
        broadcast_from_process_0(np.zeros(()))  # no process continues before they are gone
        self._manager.reload()

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        score: float | None = None,
        evaluated: bool = False,
        best: float | None = None,
        stale: int = 0,
        again: bool = False,
    ) -> None:
        """Start to save; the arrays may be donated as soon as this returns. A step that is saved is not saved again.

        The best checkpoint is that of the highest `score`. `failed` reports an error while it is written; all
        processes then call this with `again`.

        Raises:
            SaveError: the save before this one, or this one, was the last attempt.
        """
        self._finish()
        retry = again or self._failures > 0
        if retry:  # drop the failed one and its leftovers
            self._manager = self._new_manager()
        if step == self._saved:
            return
        leaves = flatten(state)
        self._saved, self._needed = step, bytes_of(state)
        if retry and broadcast_from_process_0(np.array(storage.is_committed(self._folder / str(step)))):
            # Orbax has committed this step, and saves none twice; only its seal failed.
            self._sealing = self._worker.submit(self._seal, step)
            return
        metadata = {"step": step, "score": score, "evaluated": evaluated, "best": best, "stale": stale}
        metadata["arrays"] = array_metadata(leaves)
        try:
            arrays = ocp.args.StandardSave(unflatten(leaves))
            signed = {"metadata": metadata, "sha256": manifest.sha256_of(metadata)}
            self._manager.save(step, args=arrays, custom_metadata=signed, force=True)
        except Exception as error:  # of any kind; it is counted, and raised after the last attempt
            self._failed(error)
        else:
            self._sealing = self._worker.submit(self._seal, step)

    def failed(self) -> bool:
        """True if the last save is known to have failed, so that the state should be saved again. Does not wait.

        Raises:
            SaveError: it was the last attempt.
        """
        if self._sealing is not None and self._sealing.done():
            self._finish()
        return self._failures > 0 and self._sealing is None

    def wait(self) -> bool:
        """Wait until the last save is on disk and sealed; False where it failed.

        Raises:
            SaveError: it was the last attempt.
        """
        self._finish()
        return self._failures == 0

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._finish()
        self._worker.shutdown()
        self._manager.close()

    def metadata(self, step: int) -> dict[str, Any]:
        """Metadata saved with a step: score, evaluated, and dtype, shape and digest of its arrays.

        Raises:
            CorruptCheckpointError: they cannot be read.
        """
        try:
            signed = self._manager.metadata(step).custom_metadata
            metadata, expected = signed["metadata"], signed["sha256"]
        except Exception as error:  # a corrupt file may raise anything
            self._raise_if_no_answer(step, error)
            raise CorruptCheckpointError(f"its metadata cannot be read ({type(error).__name__})") from error
        actual = manifest.sha256_of(metadata)
        if actual != expected:
            raise CorruptCheckpointError(f"its metadata has the digest {actual[:16]}, expected {str(expected)[:16]}")
        if metadata["step"] != step:
            raise CorruptCheckpointError(f"its metadata is of step {metadata['step']}")
        return metadata

    def verify_files(self, step: int) -> bool:
        """Compare every file of a step with its manifest; False where it was never sealed.

        Raises:
            CorruptCheckpointError: the first file that is missing or changed.
        """
        folder = self._folder / str(step)
        if not manifest.is_sealed(folder):
            return False
        manifest.verify(folder)
        return True

    def _restore(self, step: int, abstract: PyTree) -> tuple[PyTree, dict[str, Any]]:
        sealed = self._verified_by_first_process(step)
        metadata = self.metadata(step)
        saved, wanted = metadata["arrays"], flatten(abstract)
        started = _optional(wanted.keys() - saved.keys())
        dropped = {path: _abstract(saved[path], path, wanted) for path in _optional(saved.keys() - wanted.keys())}
        restored = {path: leaf for path, leaf in wanted.items() if path not in started} | dropped
        differences = diff(saved, restored)
        if differences:
            listed = differences[:MAX_LISTED]
            if len(differences) > MAX_LISTED:
                listed.append(f"... and {len(differences) - MAX_LISTED} more")
            raise MismatchError(mismatch_message(step, self._folder, listed))
        try:
            arrays = flatten(self._manager.restore(step, args=ocp.args.StandardRestore(unflatten(restored))))
        except Exception as error:
            if sealed:  # its files are what was written, so this is another kind of error
                raise
            self._raise_if_no_answer(step, error)
            raise CorruptCheckpointError(f"it was not sealed and cannot be read ({type(error).__name__})") from error
        for path, actual in digests(arrays).items():
            expected = metadata["arrays"][path]["digest"]
            if actual != expected:
                raise CorruptCheckpointError(f"the array {path} has the digest {actual}, expected {expected}")
        for verb, paths in {"starts anew": started, "is dropped": list(dropped)}.items():
            for part in sorted({path.split("/")[0] for path in paths}):
                self._log(f"the checkpoint of step {step} and this config differ in {part}, which {verb}")
        arrays |= {path: begin_part(path, arrays, wanted[path]) for path in started}
        return map_paths(lambda path, _: arrays[path], abstract), metadata

    def _verified_by_first_process(self, step: int) -> bool:
        """`verify_files` by process 0, the verdict shared by all."""
        sealed, failure = False, None
        if jax.process_index() == 0:
            try:
                sealed = self.verify_files(step)
            except CorruptCheckpointError as error:
                failure = error
        verdict = broadcast_from_process_0(np.array([sealed, failure is not None]))
        if verdict[1]:
            raise failure or CorruptCheckpointError("process 0 found a corrupt file")
        return bool(verdict[0])

    def _seal(self, step: int) -> None:
        """Wait for Orbax's commit, write the manifest, delete checkpoints that are not kept; in a background thread."""
        self._manager.wait_until_finished()
        if jax.process_index():
            return
        manifest.write(self._folder / str(step), step)
        folders = self._folders()
        sealed = sorted(step for step, folder in folders.items() if manifest.is_sealed(folder))
        kept = {*sealed[-self._keep :], *self._ranked(sealed)[: self._keep_best]}
        for old in sorted(folders.keys() - kept):
            if old < step:
                manifest.unseal(folders[old])
                storage.remove_folder(folders[old])

    def _folders(self) -> dict[int, Path]:
        return {int(path.name): path for path in self._folder.glob("*") if path.name.isdigit()}

    def _ranked(self, steps: list[int]) -> list[int]:
        """The steps that have a score, the best first, and of equals the latest."""
        scores = {}
        for step in steps:
            try:
                scores[step] = self.metadata(step)["score"]
            except CorruptCheckpointError:
                continue
        scores = {step: score for step, score in scores.items() if score is not None}
        return sorted(scores, key=lambda step: (scores[step], step), reverse=True)

    def _complete_copies(self) -> None:
        """Commit the sealed folders that were copied into a bucket from a disk, where a folder needs no mark of that.

        Without it Orbax takes them for unfinished ones, and deletes them.
        """
        if storage.is_bucket(self._folder) and jax.process_index() == 0:
            for folder in self._folders().values():
                if manifest.is_sealed(folder) and not storage.is_committed(folder):
                    storage.write_text(folder / storage.COMMITTED, "")

    def _raise_if_no_answer(self, step: int, error: BaseException) -> None:
        """Tell a bucket that says nothing about a checkpoint from one whose checkpoint is corrupt.

        Raises:
            StorageError: the error says so, or an object of the step cannot be read now either.
        """
        if storage.is_bucket(self._folder):
            if storage.no_answer(error):
                raise StorageError(f"{self._folder} cannot be reached: {one_line(error)}") from error
            with contextlib.suppress(FileNotFoundError):
                (self._folder / str(step) / storage.COMMITTED).read_bytes()

    def _finish(self) -> None:
        """Wait for the save in flight, if there is one."""
        sealing, self._sealing = self._sealing, None
        if sealing is None:
            return
        error = sealing.exception()
        if error is None:
            self._failures = 0
        else:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        step, self._saved = self._saved, None
        self._failures += 1
        reason = one_line(error)
        message = (
            f"the checkpoint of step {step} could not be written to {self._folder} ({type(error).__name__}: {reason}); "
            f"it needs {self._needed:,} bytes"
        )
        free = storage.free_bytes(self._folder)
        message += "" if free is None else f", {free:,} are free"
        if self._failures >= self._attempts:
            raise SaveError(f"{message}; given up after {self._failures} of save.attempts={self._attempts}") from error
        self._log(f"WARNING: {message}; attempt {self._failures} of {self._attempts}")

    def _new_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            create=not self._read_only,
            read_only=self._read_only,
            save_interval_steps=0 if self._read_only else 1,
            cleanup_tmp_directories=not self._read_only,
            lightweight_initialize=True,  # reads no metadata: those of a corrupt step would raise
            async_options=ocp.AsyncOptions(timeout_secs=self._timeout),
        )
        handler = ocp.StandardCheckpointHandler()
        return ocp.CheckpointManager(os.fspath(self._folder), options=options, item_handlers=handler)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Whether a log record is another's: what Orbax logs of an error it raises too, and the Checkpointer reports it.

    A full disk would be hundreds of lines.
    """
    return "/orbax/" not in record.pathname


def _optional(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if path.startswith(OPTIONAL_PARTS)]


def _abstract(saved: dict[str, Any], path: str, wanted: dict[str, Any]) -> jax.ShapeDtypeStruct:
    """A saved array that is restored only to be dropped: sharded as what it averages, else on every device."""
    like = wanted.get(path.removeprefix("ema/"))
    everywhere = NamedSharding(next(iter(wanted.values())).sharding.mesh, PartitionSpec())
    sharding = everywhere if like is None else like.sharding
    return jax.ShapeDtypeStruct(tuple(saved["shape"]), np.dtype(saved["dtype"]), sharding=sharding)


def _listed(steps: list[int]) -> str:
    return f"those of {', '.join(map(str, steps))}" if steps else "none"
