"""Traces of a few training steps for TensorBoard's profile plugin."""

import os
import pathlib
import tempfile
from typing import NamedTuple

import jax

from halvit_jax import storage
from halvit_jax.buckets import BucketPath
from halvit_jax.protocols import PyTree
from halvit_jax.storage import Path


class ProfileRange(NamedTuple):
    """The first and the last step to trace, counted from 0."""

    first: int
    last: int


def parse_range(text: str) -> ProfileRange:
    """`10:12` -> ProfileRange(10, 12).

    Raises:
        ValueError: not of this form, or the last step comes before the first.
    """
    first, colon, last = text.partition(":")
    if not colon or not first.isdigit() or not last.isdigit() or int(last) < int(first):
        raise ValueError(f"--profile={text} must be FIRST:LAST, two steps counted from 0, e.g. --profile=10:12")
    return ProfileRange(int(first), int(last))


class Profiler:
    """Writes one trace of the steps of `steps` into `folder`; without `steps` it does nothing."""

    def __init__(self, folder: Path, steps: ProfileRange | None = None) -> None:
        self._folder, self._steps, self._running = folder, steps, False
        self._local: tempfile.TemporaryDirectory | None = None

    def before(self, step: int) -> None:
        """Start the trace if this step is in the range."""
        if self._steps and not self._running and self._steps.first <= step <= self._steps.last:
            if isinstance(self._folder, BucketPath):  # JAX writes to disks alone
                self._local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._local.name if self._local else os.fspath(self._folder))
            self._running = True

    def after(self, step: int, outputs: PyTree) -> None:
        """Write the trace, once the outputs of its last step are computed."""
        if self._steps and self._running and step >= self._steps.last:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Write a trace that was not finished."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            if self._local:
                with self._local as written:
                    for name in storage.files_below(pathlib.Path(written)):
                        (self._folder / name).write_bytes(pathlib.Path(written, name).read_bytes())
