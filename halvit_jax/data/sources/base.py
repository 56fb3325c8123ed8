"""Where examples come from: what a source is, and data sets prepared by TFDS. Image folders are in folder.py.

A source is read in two moves. `reader` gives the entries of one part of a split in an order, and an entry is cheap to
order, repeat and skip; `fetch` turns an entry into its record and may run on many entries at once. Where records can
only be read one after the other (TFRecord) the entry holds the record; elsewhere it is a position.
"""

from collections.abc import Callable
from typing import Protocol

import tensorflow as tf

MEND_RECORD = "put it right, or prepare the data set again"

Record = dict[str, tf.Tensor]  # image: encoded bytes; label: int32; name: where it comes from, for messages
Entry = dict[str, tf.Tensor]
Reader = Callable[..., tf.data.Dataset]  # (part: int | int64 scalar, seed: int64 scalar | None) -> its entries


class Source(Protocol):
    """One split of a data set of labelled images, undecoded: skipping a record costs no decoding."""

    num_examples: int
    class_names: list[str]

    def reader(self, parts: int) -> Reader:
        """A function of a number below `parts`, and a seed, that reads this part of the split.

        Parts are consecutive, and the first ones have one record more where they cannot be equal. With a seed they come
        in an order that is a function of it; without, in their own.
        """
        ...

    def fetch(self, entry: Entry) -> Record:
        """The record of an entry. A function of tensors, for `tf.data.Dataset.map`."""
        ...


def positions(size: int, parts: int) -> Reader:
    """The reader of a source that can read any of its `size` records at any time; see `Source.reader`."""

    def read(part: tf.Tensor | int, seed: tf.Tensor | None = None) -> tf.data.Dataset:
        places = tf.range(*bounds(size, part, parts))
        if seed is not None:
            places = tf.random.experimental.stateless_shuffle(places, tf.stack([seed, 0]), alg="philox")
        return tf.data.Dataset.from_tensor_slices({"position": places})

    return read


def bounds(size: int, part: tf.Tensor | int, parts: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Where a part begins and ends, int64."""
    least, more = divmod(size, parts)
    numbers = (tf.cast(part, tf.int64), tf.cast(part, tf.int64) + 1)
    start, stop = (number * least + tf.minimum(number, more) for number in numbers)
    return start, stop


def checked(image: tf.Tensor, label: tf.Tensor, name: tf.Tensor, classes: int) -> Record:
    """The record; an error where the label is no class, which would train the model on nonsense without a word."""
    message = [name, "has the label", label, "outside of", classes, "classes"]
    with tf.control_dependencies([tf.debugging.Assert((label >= 0) & (label < classes), message)]):
        return {"image": image, "label": tf.identity(label), "name": name}
