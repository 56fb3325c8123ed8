"""The source protocol, and the cutting of a split into shards.

A source is read in two phases: index, then load. `shard` yields the entries of one shard of a split, which are cheap to
shuffle, repeat and skip; `fetch` turns an entry into its record and may run on many entries at once. An entry is a
position, or where records can only be read in sequence (TFRecord) the serialized record.
"""

from typing import Protocol

import tensorflow as tf

from halvit_jax.protocols import DatasetInfo

RECORD_HINT = "repair it, or prepare the data set again"

Entry = dict[str, tf.Tensor]
Record = dict[str, tf.Tensor]
"""Named features of one example, undecoded: `name` (its origin, for messages), `image` (encoded bytes) and others, such
as `label` (int32; where an image may have several: bool [classes], True for each)."""


class Source(Protocol):
    """One split of a data set. Skipping a record decodes nothing."""

    info: DatasetInfo

    def shard(self, index: tf.Tensor | int, count: int, seed: tf.Tensor | None = None) -> tf.data.Dataset:
        """The entries of shard number `index` of `count`.

        Shards are consecutive, and the first ones have one record more where they cannot be equal. A seed (int64
        scalar) shuffles the entries; without one they come in the order of the split. A source that is sorted by class
        permutes its records before it is cut, where a seed is given.
        """
        ...

    def fetch(self, entry: Entry) -> Record:
        """Load the record of an entry. A function of tensors, for `tf.data.Dataset.map`."""
        ...

    def diagnose(self, error: tf.errors.OpError) -> str:
        """The file that caused a reading error and the remedy; "" if the error does not show the file."""
        del error
        return ""


def position_shard(size: int, index: tf.Tensor | int, count: int, seed: tf.Tensor | None = None) -> tf.data.Dataset:
    """`Source.shard` of a source with random access to its `size` records: entries are positions."""
    positions = tf.range(*shard_bounds(size, index, count))
    if seed is not None:
        positions = tf.random.experimental.stateless_shuffle(positions, tf.stack([seed, 0]), alg="philox")
    return tf.data.Dataset.from_tensor_slices({"position": positions})


def shard_bounds(size: int, index: tf.Tensor | int, count: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The first position of a shard and the position after its last one, int64."""
    least, more = divmod(size, count)
    numbers = (tf.cast(index, tf.int64), tf.cast(index, tf.int64) + 1)
    start, stop = (number * least + tf.minimum(number, more) for number in numbers)
    return start, stop
