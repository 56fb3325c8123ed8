"""A fixed number of candidates drawn for a loss, positives first.

Source: mmdetection 3.3 `RandomSampler`: up to int(n * fraction) positives, then negatives until there are n. The
draw depends on the key alone; fold the image's number in the global batch into it, and the samples are the same on
any number of devices.

Shapes: `a` candidates, `n` slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from halvit_jax.detection.assign import BACKGROUND


class Samples(NamedTuple):
    """The drawn candidates of an image; a slot that is neither positive nor negative is empty."""

    index: jax.Array  # [n] int32, the candidate; 0 in an empty slot
    positive: jax.Array  # [n] bool; positives come first
    negative: jax.Array  # [n] bool


def sample(code: jax.Array, key: jax.Array | None, *, n: int, fraction: float) -> Samples:
    """Draw `n` candidates by their `code` [a] of `assign`, at most int(n * fraction) of them positive.

    `key=None` takes the first ones instead of random ones.
    """
    total = code.shape[0]
    if key is None:
        priority = 1 - jnp.arange(total, dtype=jnp.float32) / max(total, 1)
    else:
        priority = jax.random.uniform(key, (total,))
    most = int(n * fraction)
    positives, num_positives = _draw(code >= 0, priority, most)
    negatives, num_negatives = _draw(code == BACKGROUND, priority, n)
    slot = jnp.arange(n)
    positive = slot < num_positives
    negative = ~positive & (slot - num_positives < num_negatives)
    index = jnp.where(
        positive,
        jnp.pad(positives, (0, n - most))[slot],
        negatives[jnp.clip(slot - num_positives, 0, n - 1)],
    )
    return Samples(jnp.where(positive | negative, index, 0), positive, negative)


def _draw(candidate: jax.Array, priority: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The `n` candidates of highest priority [n], lower index first among equals, and how many there are."""
    k = min(n, candidate.shape[0])
    _, index = lax.top_k(jnp.where(candidate, priority, -1.0), k)
    return jnp.pad(index, (0, n - k)), jnp.minimum(candidate.sum(), k)
