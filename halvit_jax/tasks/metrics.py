"""Sums over the real examples of a batch, to be divided by their number once the last batch is in."""

import jax
import jax.numpy as jnp


def in_top(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the label is among the k highest logits: [b, c], [b] -> bool [b].

    Classes with equal logits rank by index, so a constant output is right on one class of c, not on all. With NaN among
    the logits nothing counts as found.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & earlier), axis=-1)
    return (rank < k) & ~jnp.isnan(logits).any(axis=-1)


def classification_sums(loss: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums of loss, top-1 and top-5 over the rows where mask is True, and their number: [b] each, -> scalars."""
    return {
        "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
        "top1": jnp.sum(in_top(logits, labels, 1) & mask).astype(jnp.float32),
        "top5": jnp.sum(in_top(logits, labels, 5) & mask).astype(jnp.float32),
        "examples": jnp.sum(mask).astype(jnp.float32),
    }
