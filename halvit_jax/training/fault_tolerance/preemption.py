"""The wish to stop: signals of this process, agreed on by all.

A platform that takes its machine back sends SIGTERM, a person at a terminal SIGINT. Each host writes what it wishes
into its rows of every batch (`stamp`); the training and evaluation steps return the largest wish of the global batch.
So all hosts learn of it at the same step without a message of their own, and act alike.
"""

import os
import signal
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np

from halvit_jax.protocols import STOPPED, Array, Batch

NONE, SAVE_AGAIN, STOP = 0, 1, 2  # what a host wishes; of several the largest counts
WISH = "wish"  # its name in a batch and among a step's outputs


def wish_of(batch: Batch) -> Array:
    """The largest wish in a batch, inside a jitted step; NONE in a batch that was never stamped."""
    return batch[WISH].max() if WISH in batch else jnp.zeros((), jnp.int32)


class Signals:
    """What has been asked of this process since `listen` began."""

    def __init__(self) -> None:
        self.name = ""  # of the signal that came first

    @contextmanager
    def listen(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT is remembered; a second one ends the process at once, with the same exit code."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stamp(self, batch: Mapping[str, np.ndarray], *, save_again: bool = False) -> dict[str, np.ndarray]:
        """The batch with this host's wish in every row."""
        wish = STOP if self.name else SAVE_AGAIN if save_again else NONE
        return {**batch, WISH: np.full(len(batch["mask"]), wish, np.int32)}

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if self.name:
            os._exit(STOPPED)
        self.name = signal.Signals(number).name
