"""Preemption: a stop requested on one host, agreed on by all.

A platform that preempts a machine sends SIGTERM; Ctrl-C in a terminal sends SIGINT. Each host writes its request into
its rows of every batch (`attach_request`), and the training and evaluation steps return the largest request of the
global batch. So all hosts learn of it at the same step without an extra message.
"""

import os
import signal
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np

from halvit_jax.protocols import Array, Batch, ExitCode

NONE, SAVE_AGAIN, STOP = 0, 1, 2  # requests of a host; the largest of all counts
REQUEST = "request"  # its name in a batch and among a step's outputs


def requested(batch: Batch) -> Array:
    """The largest request in a batch, inside a jitted step; NONE in a batch without any."""
    return batch[REQUEST].max() if REQUEST in batch else jnp.zeros((), jnp.int32)


class PreemptionHandler:
    """Stop requests to this process by SIGTERM and SIGINT, from `install` on."""

    def __init__(self) -> None:
        self.name = ""  # of the first signal

    @contextmanager
    def install(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT is remembered; a second one ends the process at once, with the same exit code."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def attach_request(self, batch: Mapping[str, np.ndarray], *, save_again: bool = False) -> dict[str, np.ndarray]:
        """The batch with this host's request in every row."""
        request = STOP if self.name else SAVE_AGAIN if save_again else NONE
        return {**batch, REQUEST: np.full(len(batch["mask"]), request, np.int32)}

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if self.name:
            os._exit(ExitCode.PREEMPTED)
        self.name = signal.Signals(number).name
