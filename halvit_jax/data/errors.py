"""Errors in data: which record broke a batch, and how many images had to be replaced."""

import atexit
import contextlib
import functools
import logging
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from halvit_jax.data import file_formats, ops
from halvit_jax.data.sources.base import RECORD_HINT, Entry, Source
from halvit_jax.protocols import DataError
from halvit_jax.text import first_few

LOG = logging.getLogger("halvit_jax.data")
IMAGE_HINT = "remove it, or set data.on_bad_image='replace'"
ACTIVE_ITERATORS: weakref.WeakSet[Generator] = weakref.WeakSet()


class ErrorTracker:
    """Passes on the batches of one loader without `decoded` and `name`, the features it tracks errors by.

    Args:
        source: the source of the records.
        prepare: (..., entry) -> example, as the loader maps it.
        replay: step -> the arguments of `prepare` for this process's rows of its batch.
        budget: the largest fraction of an epoch's examples that may be replaced; one is always allowed.
        steps_per_epoch: steps after which the count restarts.
    """

    def __init__(
        self,
        source: Source,
        prepare: Callable[..., Any],
        replay: Callable[[int], Iterator[tuple]],
        *,
        budget: float,
        steps_per_epoch: int,
    ) -> None:
        self._source, self._prepare, self._replay = source, prepare, replay
        self._steps_per_epoch = steps_per_epoch
        self._allowed = max(1, int(budget * source.info.num_examples))
        self._replaced: set[str] = set()  # in this epoch; a repeated image counts once
        self._logged: set[str] = set()  # in any epoch

    def batches(
        self, batches: Iterator[dict[str, np.ndarray]], first_step: int, *, names: bool = False
    ) -> Iterator[dict[str, np.ndarray]]:
        """The batches from step `first_step` on; with `names`, the name of each record as well.

        Raises:
            DataError: a file is corrupt, an image cannot be decoded, or more images were replaced than allowed.
        """
        tracked = self._tracked(batches, first_step, names)
        ACTIVE_ITERATORS.add(tracked)
        _close_iterators_at_exit()
        return tracked

    def _tracked(
        self, batches: Iterator[dict[str, np.ndarray]], step: int, keep_names: bool
    ) -> Generator[dict[str, np.ndarray], None, None]:
        try:
            for batch in batches:
                if step % self._steps_per_epoch == 0:
                    self._replaced.clear()
                decoded, names = batch.pop("decoded"), batch.pop("name")
                if not decoded.all():
                    self._count({name.decode() for name in names[~decoded]})
                yield {**batch, "name": names} if keep_names else batch
                step += 1
        except tf.errors.OpError as error:
            traceback.clear_frames(error.__traceback__)  # they hold the iterator, as this frame does
            raise DataError(self._diagnose(step, error)) from error
        finally:
            del batches

    def _count(self, names: set[str]) -> None:
        self._replaced |= names
        new = sorted(names - self._logged)
        self._logged |= names
        if new:
            LOG.warning("replaced images that cannot be decoded, %d so far: %s", len(self._logged), first_few(new))
        if len(self._replaced) > self._allowed:
            raise DataError(
                f"{len(self._replaced)} images of this epoch cannot be decoded, but only {self._allowed} may be: "
                f"{first_few(sorted(self._replaced))}; remove them, or raise data.bad_image_budget"
            )

    def _diagnose(self, step: int, error: tf.errors.OpError) -> str:
        """The cause of an error in the batch of this step: by the source, or by preparing its examples once more."""
        found = self._source.diagnose(error)
        if found:
            return found
        try:
            for example in self._replay(step):
                name = self._source.fetch(example[-1])["name"].numpy().decode()
                try:
                    self._prepare(*example)
                except tf.errors.OpError as cause:
                    return f"{name} cannot be decoded ({ops.reason(cause)}); {IMAGE_HINT}"
        except (tf.errors.OpError, ValueError) as cause:  # of the record itself, whose message names it
            return f"{ops.reason(cause)}; {RECORD_HINT}"
        return ops.reason(error)  # all could be read this time


def undecodable(source: Source) -> list[str]:
    """All images of a source that cannot be decoded whole, as "NAME: REASON"."""

    def probe(encoded: tf.Tensor) -> tf.Tensor:
        return tf.shape(ops.decode(file_formats.to_decodable(encoded)))[:1]

    def tried(entry: Entry) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        record = source.fetch(entry)
        _, good = ops.try_or_default(probe, record["image"], default=np.zeros(1, np.int32))
        return record["name"], record["image"], good

    found = source.shard(0, 1).map(ops.no_autograph(tried), num_parallel_calls=tf.data.AUTOTUNE)
    lines = []
    for name, encoded, good in found.filter(ops.no_autograph(lambda name, encoded, good: ~good)):
        del good
        try:
            probe(encoded)
        except tf.errors.OpError as error:
            lines.append(f"{name.numpy().decode()}: {ops.reason(error)}")
    return lines


@functools.cache
def _close_iterators_at_exit() -> None:
    """Stop reading before the process exits.

    TensorFlow's threads call Python to read ArrayRecord. While Python shuts down, both wait for each other.
    """

    def close() -> None:
        for batches in list(ACTIVE_ITERATORS):
            with contextlib.suppress(ValueError):  # another thread is inside
                batches.close()

    atexit.register(close)
