"""Watching over batches: which file is to blame for an error, and how many images had to be replaced."""

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

from halvit_jax.data import ops
from halvit_jax.data.sources.base import MEND_RECORD, Source
from halvit_jax.data.sources.tfds import TfrecordSource
from halvit_jax.protocols import DataError
from halvit_jax.text import first_few

LOG = logging.getLogger("halvit_jax.data")
MEND_IMAGE = "remove it, or set data.on_bad_image='replace'"
UNDER_WAY: weakref.WeakSet[Generator] = weakref.WeakSet()  # what is iterated over at this moment


class Watch:
    """Passes on the batches of one loader, without the fields that are only for this watch (`good`, `name`).

    Args:
        source: what the batches are read from.
        prepare: an example's entry, and what stands before it, -> the example.
        again: step -> the arguments of `prepare` for this host's rows of its batch.
        budget: the largest share of an epoch's examples that may be replaced; one always may.
        steps_per_epoch: steps after which counting begins anew.
    """

    def __init__(
        self,
        source: Source,
        prepare: Callable[..., Any],
        again: Callable[[int], Iterator[tuple]],
        *,
        budget: float,
        steps_per_epoch: int,
    ) -> None:
        self._source, self._prepare, self._again = source, prepare, again
        self._steps_per_epoch = steps_per_epoch
        self._allowed = max(1, int(budget * source.num_examples))
        self._replaced: set[str] = set()  # in this epoch; a repeated image is one

    def batches(self, batches: Iterator[dict[str, np.ndarray]], first_step: int) -> Iterator[dict[str, np.ndarray]]:
        """The batches from step `first_step` on.

        Raises:
            DataError: a file is damaged, an image cannot be decoded, or more images than allowed had to be replaced.
        """
        watched = self._watched(batches, first_step)
        UNDER_WAY.add(watched)
        _end_before_python_does()
        return watched

    def _watched(
        self, batches: Iterator[dict[str, np.ndarray]], step: int
    ) -> Generator[dict[str, np.ndarray], None, None]:
        try:
            for batch in batches:
                if step % self._steps_per_epoch == 0:
                    self._replaced.clear()
                good, names = batch.pop("good"), batch.pop("name")
                if not good.all():
                    self._count({name.decode() for name in names[~good]})
                yield batch
                step += 1
        except tf.errors.OpError as error:
            traceback.clear_frames(error.__traceback__)  # which hold the iterator, as this frame does
            raise DataError(self._blame(step, error)) from error
        finally:
            del batches

    def _count(self, names: set[str]) -> None:
        self._replaced |= names
        LOG.warning("replaced what cannot be decoded, number %d of this epoch: %s", len(self._replaced), sorted(names))
        if len(self._replaced) > self._allowed:
            raise DataError(
                f"{len(self._replaced)} images of this epoch cannot be decoded, {self._allowed} are allowed: "
                f"{first_few(sorted(self._replaced))}; remove them, or raise data.bad_image_budget"
            )

    def _blame(self, step: int, error: tf.errors.OpError) -> str:
        """What went wrong in the batch of this step, and with which record; its examples are prepared once more."""
        if isinstance(error, tf.errors.DataLossError) and isinstance(self._source, TfrecordSource):
            return self._source.blame(error)
        try:
            for example in self._again(step):
                name = self._source.fetch(example[-1])["name"].numpy().decode()
                try:
                    self._prepare(*example)
                except tf.errors.OpError as found:
                    return f"{name} cannot be decoded ({ops.reason(found)}); {MEND_IMAGE}"
        except (tf.errors.OpError, ValueError) as found:  # of the record itself, and these name it
            return f"{ops.reason(found)}; {MEND_RECORD}"
        return ops.reason(error)  # it could be read this time


@functools.cache
def _end_before_python_does() -> None:
    """When the process ends, no batch may be in the making.

    TensorFlow's threads call Python to read ArrayRecord; where Python is being taken down they wait for it for ever,
    and it for them.
    """

    def end() -> None:
        for batches in list(UNDER_WAY):
            with contextlib.suppress(ValueError):  # another thread is inside
                batches.close()

    atexit.register(end)
