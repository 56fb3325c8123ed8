"""From records to batches: order, seeds, resume, batching, padding and mask.

The order of examples is a function of (seed, epoch), their augmentation of (seed, epoch, number of the example in the
epoch). So the batch of any step can be computed, and a resumed run needs nothing about data from its checkpoint.

Elastic: the split is cut into a fixed number of readers, each of which fills a fixed part of every global batch. A host
owns readers / hosts of them, in order. So the global batch of a step is the same on 1, 2, 4 ... hosts.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from halvit_jax.data import ops
from halvit_jax.data.errors import Watch
from halvit_jax.data.evals import parse_evals
from halvit_jax.data.sources import open_sources
from halvit_jax.data.sources.base import Entry, Reader, Source
from halvit_jax.data.transforms import Transform, eval_transform, train_transform
from halvit_jax.protocols import Loader


class Host(NamedTuple):
    """Which of how many hosts this is."""

    index: int = 0
    count: int = 1


ONLY_HOST = Host()


class Loaders(NamedTuple):
    """The two loaders of a run and the names of its classes."""

    train: Loader
    eval: Loader
    class_names: list[str]


def make_loaders(
    *,
    name: str,
    data_dir: str,
    root: str,
    train_split: str,
    eval_name: str,
    eval_split: str,
    evals: Sequence[str],
    crop: str,
    min_crop_area: float,
    flip: bool,
    shift: int,
    color_jitter: float,
    augment: str,
    interpolation: str,
    antialias: bool,
    eval_crop: float,
    on_bad_image: str,
    bad_image_budget: float,
    repeated_aug: int,
    virtual_shards: int,
    shuffle_buffer: int,
    batch_size: int,
    image_size: int,
    seed: int,
    host: Host = ONLY_HOST,
) -> Loaders:
    """The loaders of `config.data`, whose fields say what each keyword is.

    Raises:
        ValueError: a value that is not allowed, or a data set that is not there, with the command that prepares it.
    """
    train_image = train_transform(
        image_size,
        crop=crop,
        min_area=min_crop_area,
        flip=flip,
        shift=shift,
        policy=augment,
        color_jitter=color_jitter,
        method=interpolation,
        antialias=antialias,
        on_bad_image=on_bad_image,
    )
    eval_image = eval_transform(image_size, share=eval_crop, method=interpolation, on_bad_image=on_bad_image)
    if not 0.0 <= bad_image_budget <= 1.0:
        raise ValueError(f"data.bad_image_budget={bad_image_budget} must lie between 0 and 1")
    parse_evals(evals)
    train_source, eval_source = open_sources(name, data_dir, root, train_split, eval_name or name, eval_split)
    train = TrainLoader(
        train_source,
        train_image,
        batch_size=batch_size,
        seed=seed,
        virtual_shards=virtual_shards,
        shuffle_buffer=shuffle_buffer,
        repeated_aug=repeated_aug,
        bad_image_budget=bad_image_budget,
        host=host,
    )
    evaluation = EvalLoader(
        eval_source, eval_image, batch_size=batch_size, bad_image_budget=bad_image_budget, host=host
    )
    return Loaders(train, evaluation, train_source.class_names)


class TrainLoader:
    """Endless shuffled batches; see the module's head for what they are a function of.

    An epoch is as many whole batches as every reader can fill; which examples stay out changes with the epoch. With
    `repeated_aug` > 1 an epoch takes 1 / repeated_aug of the examples, each so many times in a row with other
    augmentation.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        virtual_shards: int = 64,
        shuffle_buffer: int = 16_384,
        repeated_aug: int = 1,
        bad_image_budget: float = 0.0,
        host: Host = ONLY_HOST,
    ) -> None:
        self._readers = math.gcd(batch_size, virtual_shards)  # so that every reader fills an equal part of the batch
        if self._readers % host.count:
            raise ValueError(
                f"{host.count} hosts cannot share {self._readers} readers equally; make batch_size={batch_size} and "
                f"data.virtual_shards={virtual_shards} multiples of the number of hosts"
            )
        if repeated_aug < 1:
            raise ValueError(f"data.repeated_aug={repeated_aug} must be at least 1")
        self._source, self._transform = source, transform
        self._batch_size, self._seed, self._repeats, self._host = batch_size, seed, repeated_aug, host
        self._share = batch_size // self._readers  # rows of a global batch that a reader fills
        self._budget = bad_image_budget
        self._buffer = max(shuffle_buffer // self._readers, 1)
        self.num_examples = source.num_examples
        self.steps_per_epoch = source.num_examples // self._readers // self._share
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch_size={batch_size} over {self._readers} readers asks for more than the {source.num_examples} "
                "examples of data.train_split; lower batch_size or data.virtual_shards"
            )

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This host's rows of the batches from `start_step` on, without end.

        Starting inside an epoch reads that epoch's records up to there, undecoded.
        """
        rows = self._batch_size // self._host.count
        examples = self._entries(start_step).map(
            ops.plain(self._prepare), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        batches = examples.batch(rows, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
        watch = Watch(
            self._source, self._prepare, self._again, budget=self._budget, steps_per_epoch=self.steps_per_epoch
        )
        return watch.batches(batches.as_numpy_iterator(), start_step)

    def _entries(self, start_step: int) -> tf.data.Dataset:
        """(epoch, number among this host's rows of the epoch, entry) from the first row of a step on."""
        first_epoch, skipped = divmod(start_step, self.steps_per_epoch)
        own = self._readers // self._host.count
        first = self._host.index * own
        read = self._source.reader(self._readers)
        rows = own * self._share

        def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
            skip = tf.where(epoch == first_epoch, tf.constant(skipped, tf.int64), tf.constant(0, tf.int64))

            def one_reader(part: tf.Tensor) -> tf.data.Dataset:
                return self._order(read, part, epoch, skip)

            parts = tf.data.Dataset.range(first, first + own)
            entries = parts.interleave(ops.plain(one_reader), cycle_length=own, block_length=self._share)
            return entries.enumerate(skip * rows).map(ops.plain(lambda n, entry: (epoch, n, entry)))

        return tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max).flat_map(ops.plain(one_epoch))

    def _prepare(self, epoch: tf.Tensor, n: tf.Tensor, entry: Entry) -> dict[str, tf.Tensor]:
        record = self._source.fetch(entry)
        rows = self._batch_size // self._host.count
        step, row = n // rows, n % rows
        number = step * self._batch_size + self._host.index * rows + row  # of the example in the epoch
        picture = self._transform(record["image"], tf.stack([epoch + (self._seed << 32), number]))
        # An image that could not be decoded is grey and counts for nothing.
        return {"label": record["label"], "mask": picture["good"], "name": record["name"], **picture}

    def _again(self, step: int) -> Iterator[tuple]:
        yield from self._entries(step).take(self._batch_size // self._host.count)

    def _order(self, read: Reader, part: tf.Tensor, epoch: tf.Tensor, skip: tf.Tensor) -> tf.data.Dataset:
        """One reader's records of an epoch, from those of batch number `skip` on."""
        seed = ops.fold_in(tf.stack([epoch, tf.constant(self._seed, tf.int64)]), part)
        records = read(part, seed[0]).shuffle(self._buffer, seed=seed[0])
        if self._repeats > 1:
            records = records.flat_map(
                ops.plain(lambda record: tf.data.Dataset.from_tensors(record).repeat(self._repeats))
            )
        return records.take(self.steps_per_epoch * self._share).skip(skip * self._share)


class EvalLoader:
    """One pass over a split in its own order, every example once on any number of hosts.

    Each host gets an equal number of batches; rows that only fill up have mask False.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        bad_image_budget: float = 0.0,
        host: Host = ONLY_HOST,
    ) -> None:
        if batch_size % host.count:
            raise ValueError(f"batch_size={batch_size} must be a multiple of the {host.count} hosts")
        self._source, self._transform, self._host = source, transform, host
        self._budget = bad_image_budget
        self._rows = batch_size // host.count
        self.num_examples = source.num_examples
        self.steps_per_epoch = math.ceil(math.ceil(source.num_examples / host.count) / self._rows)

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This host's rows of the batches from number `start_step` on."""
        examples = self._entries().map(
            ops.plain(self._prepare), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        blank = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), examples.element_spec)
        blank["good"] = tf.constant(True)  # it only fills up
        examples = examples.concatenate(tf.data.Dataset.from_tensors(blank).repeat())
        batches = examples.batch(self._rows, drop_remainder=True).take(self.steps_per_epoch)
        batches = batches.skip(start_step).prefetch(tf.data.AUTOTUNE)
        watch = Watch(
            self._source, self._prepare, self._again, budget=self._budget, steps_per_epoch=self.steps_per_epoch
        )
        return watch.batches(batches.as_numpy_iterator(), start_step)

    def _entries(self) -> tf.data.Dataset:
        return self._source.reader(self._host.count)(self._host.index)

    def _prepare(self, entry: Entry) -> dict[str, tf.Tensor]:
        record = self._source.fetch(entry)
        picture = self._transform(record["image"], tf.zeros(2, tf.int64))
        # An image that could not be decoded is grey and counts nevertheless, or fewer would be scored than there are.
        return {"label": record["label"], "mask": tf.constant(True), "name": record["name"], **picture}

    def _again(self, step: int) -> Iterator[tuple]:
        for entry in self._entries().skip(step * self._rows).take(self._rows):
            yield (entry,)
