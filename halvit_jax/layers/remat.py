"""Rematerialisation: recompute activations in the backward pass instead of keeping them in memory."""

import jax
from flax import linen as nn


def run_block(block: nn.Module, *arrays: jax.Array, remat: bool, train: bool) -> jax.Array:
    """`block(*arrays, train=train)`; with `remat`, only its inputs are kept for the backward pass."""

    def run(block: nn.Module, *arrays: jax.Array) -> jax.Array:
        return block(*arrays, train=train)

    return (nn.remat(run) if remat else run)(block, *arrays)
