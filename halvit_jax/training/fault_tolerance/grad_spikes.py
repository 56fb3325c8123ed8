"""Skipped updates: the guard against single gradients that are not finite or far longer than usual."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from halvit_jax.protocols import Array

AVERAGED = 0.98  # weight of the past in the average of the gradient's norm


class SpikesError(ArithmeticError):
    """More updates were left out than the limit allows."""


class Limit(NamedTuple):
    """Leave an update out whose gradient is not finite or `factor` times longer than usual; 0 switches this off.

    More than `most` such updates in `window` steps end the run.
    """

    factor: float = 0.0
    most: int = 10
    window: int = 1000

    def init(self) -> dict[str, Array]:
        """What is remembered, as a part of the train state: the usual norm, and when updates were left out last."""
        if not self.factor:
            return {}
        return {"norm": jnp.zeros(()), "left_out": jnp.full(self.most + 1, -self.window - 1, jnp.int32)}

    def judge(self, memory: Mapping[str, Array], norm: Array, step: Array) -> "Verdict":
        """Whether the update of this step is left out, whether these are too many now, and what to remember."""
        usual, left_out = memory["norm"], memory["left_out"]
        known = usual > 0
        skip = ~jnp.isfinite(norm) | (known & (norm > self.factor * usual))
        mean = jnp.where(known, AVERAGED * usual + (1 - AVERAGED) * norm, norm)
        pushed = jnp.roll(left_out, -1).at[-1].set(step)
        new = {"norm": jnp.where(skip, usual, mean), "left_out": jnp.where(skip, pushed, left_out)}
        return Verdict(skip, skip & (step - pushed[0] < self.window), new)

    def exceeded(self, step: int) -> SpikesError:
        """The error that ends the run."""
        return SpikesError(
            f"more than skip_updates.max_skipped={self.most} updates left out within skip_updates.window={self.window} "
            f"at step {step}"
        )


NO_LIMIT = Limit()


def make_limit(*, norm_factor: float, max_skipped: int, window: int) -> Limit:
    """The limit of `config.skip_updates`.

    Raises:
        ValueError: a value that is not allowed.
    """
    if norm_factor and norm_factor <= 1.0:
        raise ValueError(f"skip_updates.norm_factor={norm_factor} must be 0 (off) or above 1")
    for name, value in {"max_skipped": max_skipped, "window": window}.items():
        if value < 1:
            raise ValueError(f"skip_updates.{name}={value} must be at least 1")
    return Limit(norm_factor, max_skipped, window)


class Verdict(NamedTuple):
    """What `Limit.judge` says of one update."""

    skip: Array
    too_many: Array
    memory: dict[str, Array]
