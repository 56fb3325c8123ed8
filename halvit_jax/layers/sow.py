"""Arrays on the way through a model, for those who ask: Flax's collection "intermediates"."""

import jax
import jax.numpy as jnp
from flax import linen as nn


def keep(module: nn.Module, name: str, *parts: jax.Array) -> None:
    """Hand the parts, side by side along their last axis, to a caller who asks for intermediates.

    Nobody else pays for it. A module that runs several times keeps one array for each run, in order.
    """
    if module.is_mutable_collection("intermediates") and not module.is_initializing():
        module.sow("intermediates", name, jnp.concatenate(parts, axis=-1))
