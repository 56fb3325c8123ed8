"""Stochastic depth: whole residual branches dropped per example.

Gao Huang, Yu Sun, Zhuang Liu, Daniel Sedra, Kilian Weinberger, "Deep Networks with Stochastic Depth", ECCV 2016,
https://arxiv.org/abs/1603.09382.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn


class DropPath(nn.Module):
    """Zero the branch of each example with probability `rate`, and scale the survivors by 1 / (1 - rate).

    x: [b, ...]. Draws from the random stream "drop_path", and only in training with a positive rate.
    """

    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not train or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        alive = jax.random.bernoulli(self.make_rng("drop_path"), keep, shape)
        return jnp.where(alive, x / keep, jnp.zeros_like(x))


def linear_rates(rate: float, depth: int) -> list[float]:
    """The rates of `depth` blocks, rising linearly from 0 to `rate`."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def stage_rates(rate: float, depths: Sequence[int]) -> list[tuple[float, ...]]:
    """`linear_rates` through all blocks of several stages: for each stage, the rates of its blocks."""
    rates = iter(linear_rates(rate, sum(depths)))
    return [tuple(itertools.islice(rates, depth)) for depth in depths]
