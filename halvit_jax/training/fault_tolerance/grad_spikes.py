"""Skipped updates: a guard against single gradients that are not finite or have a much larger norm than usual."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from halvit_jax.protocols import Array

AVERAGED = 0.98  # weight of the past in the average of the gradient's norm


class SpikesError(ArithmeticError):
    """More updates were skipped than the guard allows."""


class GradSpikeGuard(NamedTuple):
    """Skip an update if its gradient is not finite or its norm is `norm_factor` times the usual; 0 switches this off.

    More than `max_skipped` such updates in `window` steps end the run.
    """

    norm_factor: float = 0.0
    max_skipped: int = 10
    window: int = 1000

    def init(self) -> dict[str, Array]:
        """The guard's part of the train state: the usual norm, and the steps that were skipped last."""
        if not self.norm_factor:
            return {}
        return {"norm": jnp.zeros(()), "skipped": jnp.full(self.max_skipped + 1, -self.window - 1, jnp.int32)}

    def update(self, state: Mapping[str, Array], norm: Array, step: Array) -> "SpikeDecision":
        """Decide on the update of this step from the norm of its gradient."""
        usual, skipped = state["norm"], state["skipped"]
        known = usual > 0
        skip = ~jnp.isfinite(norm) | (known & (norm > self.norm_factor * usual))
        mean = jnp.where(known, AVERAGED * usual + (1 - AVERAGED) * norm, norm)
        pushed = jnp.roll(skipped, -1).at[-1].set(step)
        new = {"norm": jnp.where(skip, usual, mean), "skipped": jnp.where(skip, pushed, skipped)}
        return SpikeDecision(skip, skip & (step - pushed[0] < self.window), new)

    def too_many_error(self, step: int) -> SpikesError:
        """The error that ends the run."""
        return SpikesError(
            f"more than skip_updates.max_skipped={self.max_skipped} updates skipped within "
            f"skip_updates.window={self.window} at step {step}"
        )


OFF = GradSpikeGuard()


def make_guard(*, norm_factor: float, max_skipped: int, window: int) -> GradSpikeGuard:
    """The guard of `config.skip_updates`.

    Raises:
        ValueError: a value that is not allowed.
    """
    if norm_factor and norm_factor <= 1.0:
        raise ValueError(f"skip_updates.norm_factor={norm_factor} must be 0 (off) or above 1")
    for name, value in {"max_skipped": max_skipped, "window": window}.items():
        if value < 1:
            raise ValueError(f"skip_updates.{name}={value} must be at least 1")
    return GradSpikeGuard(norm_factor, max_skipped, window)


class SpikeDecision(NamedTuple):
    """Decision about one update: whether to skip it, whether too many were skipped, and the guard's new state."""

    skip: Array
    too_many: Array
    state: dict[str, Array]
