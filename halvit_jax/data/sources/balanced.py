"""Balanced sampling: a source whose training order draws rare classes more often (`data.balance`)."""

import numpy as np
import tensorflow as tf

from halvit_jax.data.ops import no_autograph
from halvit_jax.data.sources.base import Entry, Record, Source, shard_bounds


class BalancedSource(Source):
    """A source of which each position of an epoch is drawn anew: a class, then one of its images.

    A class of n images is drawn in proportion to n ** (1 - power): 0 leaves images equally likely, 1 classes. A draw is
    a function of the seed and the position, so that order is deterministic and the same on any number of hosts; an
    epoch is as long as without, and leaves some images out. Without a seed the source is read as it is.

    Raises:
        ValueError: a power outside of [0, 1], or a source that can only be read in sequence.
    """

    def __init__(self, source: Source, power: float) -> None:
        if not 0.0 <= power <= 1.0:
            raise ValueError(f"data.balance={power} must lie between 0 and 1")
        entries = source.shard(0, 1)
        if set(entries.element_spec) != {"position"}:
            raise ValueError(
                f"data.balance={power} needs random access: a folder, a data set prepared as ArrayRecord or a small one"
            )
        self._source, self.info = source, source.info
        found = entries.map(no_autograph(lambda entry: source.fetch(entry)["label"]))
        labels = np.fromiter(found.as_numpy_iterator(), np.int64, source.info.num_examples)
        counts = np.bincount(labels, minlength=len(source.info.class_names))
        shares = np.where(counts > 0, np.maximum(counts, 1) ** (1.0 - power), 0.0)
        self._ends = tf.constant(np.cumsum(shares) / shares.sum())
        self._order = tf.constant(np.argsort(labels, kind="stable"))  # positions, class by class
        self._counts, self._starts = tf.constant(counts), tf.constant(np.cumsum(counts) - counts)

    def shard(self, index: tf.Tensor | int, count: int, seed: tf.Tensor | None = None) -> tf.data.Dataset:
        """The positions of a shard; with a seed as many that are drawn."""
        if seed is None:
            return self._source.shard(index, count)
        places = tf.data.Dataset.range(*shard_bounds(self.info.num_examples, index, count))

        def draw(place: tf.Tensor) -> Entry:
            draws = tf.random.stateless_uniform((2,), tf.stack([seed, place]), dtype=tf.float64)
            label = tf.searchsorted(self._ends, draws[:1], side="right")[0]
            label = tf.minimum(label, len(self._ends) - 1)
            number = tf.cast(draws[1] * tf.cast(self._counts[label], tf.float64), tf.int64)
            return {"position": tf.gather(self._order, self._starts[label] + number)}

        return places.map(no_autograph(draw))

    def fetch(self, entry: Entry) -> Record:
        """The record at the entry's position."""
        return self._source.fetch(entry)

    def diagnose(self, error: tf.errors.OpError) -> str:
        """As the source."""
        return self._source.diagnose(error)
