"""Intermediate arrays of a model, in Flax's collection "intermediates"."""

import jax
import jax.numpy as jnp
from flax import linen as nn


def sow(module: nn.Module, name: str, *parts: jax.Array) -> None:
    """Sow the parts, concatenated along their last axis; free if the collection is not mutable.

    A module that runs several times sows one array for each run, in order.
    """
    if module.is_mutable_collection("intermediates") and not module.is_initializing():
        module.sow("intermediates", name, jnp.concatenate(parts, axis=-1))
