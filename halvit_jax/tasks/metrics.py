"""Classification metrics: sums over the real examples of a batch, and their means over a whole evaluation."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from halvit_jax.protocols import Array, Batch


class MeanCollector:
    """Collector of sums over examples: each metric is its sum divided by the sum `examples`."""

    reads = ()

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}

    def add(self, scored: Mapping[str, Array], batch: Batch) -> None:
        """Add the sums of one batch."""
        del batch
        for name, value in scored.items():
            self._totals[name] = self._totals.get(name, 0.0) + float(value)

    def result(self) -> dict[str, float | None]:
        """The means; None without examples."""
        examples = self._totals.get("examples", 0.0)
        means = {name: value / examples if examples else None for name, value in self._totals.items()}
        means.pop("examples", None)
        return means


def in_top(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """True if the label is among the k highest logits: [b, c], [b] -> bool [b].

    Classes with equal logits rank by index, so a constant output is correct for one class of c, not for all. Rows with
    NaN are False.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[-1])[None] < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & earlier), axis=-1)
    return (rank < k) & ~jnp.isnan(logits).any(axis=-1)


def best_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Of several labels, bool [b, c], the one of the highest logit, so an answer is right if it is any: int32 [b]."""
    return jnp.argmax(jnp.where(labels, logits, -jnp.inf), axis=-1)


def classification_sums(loss: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums of loss, top-1 and top-5 over the rows where mask is True, and their number: [b] each, -> scalars.

    Of five classes and fewer there is no top-5, which would always be 1.
    """
    tops = {f"top{k}": k for k in (1, 5) if k == 1 or k < logits.shape[-1]}
    return {
        "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
        **{name: jnp.sum(in_top(logits, labels, k) & mask).astype(jnp.float32) for name, k in tops.items()},
        "examples": jnp.sum(mask).astype(jnp.float32),
    }
