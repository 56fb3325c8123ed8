"""From records to batches: order, seeds, resume, batching, padding and mask.

The order of examples is a function of (seed, epoch), their augmentation of (seed, epoch, number of the example in the
epoch). So the batch of any step can be computed, and a resumed run needs nothing about data from its checkpoint.

Elastic: the split is cut into a fixed number of readers, each of which fills a fixed part of every global batch. A host
owns readers / hosts of them, in order. So the global batch of a step is the same on 1, 2, 4 ... hosts.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from halvit_jax.data import augment, ops
from halvit_jax.data.sources import Entry, Reader, Record, Source, name_damage, open_sources
from halvit_jax.protocols import Loader

Transform = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # (encoded image, seed [2]) -> uint8 [size, size, 3]


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
    eval_split: str,
    crop: str,
    min_crop_area: float,
    flip: bool,
    shift: int,
    rand_augment: str,
    interpolation: str,
    antialias: bool,
    eval_crop: float,
    repeats: int,
    readers: int,
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
        rand_augment=rand_augment,
        method=_checked(interpolation),
        antialias=antialias,
    )
    train_source, eval_source = open_sources(name, data_dir, root, train_split, eval_split)
    train = TrainLoader(
        train_source,
        train_image,
        batch_size=batch_size,
        seed=seed,
        readers=readers,
        shuffle_buffer=shuffle_buffer,
        repeats=repeats,
        host=host,
    )
    evaluation = EvalLoader(
        eval_source,
        eval_transform(image_size, share=eval_crop, method=interpolation),
        batch_size=batch_size,
        host=host,
    )
    return Loaders(train, evaluation, train_source.class_names)


class TrainLoader:
    """Endless shuffled batches; see the module's head for what they are a function of.

    An epoch is as many whole batches as every reader can fill; which examples stay out changes with the epoch. With
    `repeats` > 1 an epoch takes 1 / repeats of the examples, each so many times in a row with other augmentation.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        readers: int = 64,
        shuffle_buffer: int = 16_384,
        repeats: int = 1,
        host: Host = ONLY_HOST,
    ) -> None:
        self._readers = math.gcd(batch_size, readers)  # so that every reader fills an equal part of the batch
        if self._readers % host.count:
            raise ValueError(
                f"{host.count} hosts cannot share {self._readers} readers equally; make batch_size={batch_size} and "
                f"data.readers={readers} multiples of the number of hosts"
            )
        if repeats < 1:
            raise ValueError(f"data.repeats={repeats} must be at least 1")
        self._source, self._transform = source, transform
        self._batch_size, self._seed, self._repeats, self._host = batch_size, seed, repeats, host
        self._share = batch_size // self._readers  # rows of a global batch that a reader fills
        self._buffer = max(shuffle_buffer // self._readers, 1)
        self.num_examples = source.num_examples
        self.steps_per_epoch = source.part_size(self._readers) // self._share
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch_size={batch_size} over {self._readers} readers asks for more than the {source.num_examples} "
                "examples of data.train_split; lower batch_size or data.readers"
            )

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This host's rows of the batches from `start_step` on, without end.

        Starting inside an epoch reads that epoch's records up to there, undecoded.
        """
        first_epoch, skipped = divmod(start_step, self.steps_per_epoch)
        own = self._readers // self._host.count
        first = self._host.index * own
        readers = {part: self._source.reader(part, self._readers) for part in range(first, first + own)}
        rows = own * self._share
        epochs = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)

        def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
            skip = tf.where(epoch == first_epoch, tf.constant(skipped, tf.int64), tf.constant(0, tf.int64))
            ordered = tuple(self._order(read, part, epoch, skip) for part, read in readers.items())
            records = tf.data.Dataset.zip(ordered).map(_concatenate).unbatch()
            return records.enumerate(skip * rows).map(lambda n, record: (epoch, n, record))

        def prepare(epoch: tf.Tensor, n: tf.Tensor, entry: Entry) -> Record:
            record = self._source.fetch(entry)
            step, row = n // rows, n % rows
            number = step * self._batch_size + self._host.index * rows + row  # of the example in the epoch
            seed = tf.stack([epoch + (self._seed << 32), number])
            return {
                "image": self._transform(record["image"], seed),
                "label": record["label"],
                "mask": tf.constant(True),
            }

        examples = epochs.flat_map(one_epoch).map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        batches = examples.batch(rows, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
        return name_damage(batches.as_numpy_iterator(), self._source)

    def _order(self, read: Reader, part: int, epoch: tf.Tensor, skip: tf.Tensor) -> tf.data.Dataset:
        """One reader's records of an epoch in batches of its share, from batch `skip` on."""
        seed = ops.fold_in(tf.stack([epoch, tf.constant(self._seed, tf.int64)]), part)
        records = read(seed[0]).shuffle(self._buffer, seed=seed[0])
        if self._repeats > 1:
            records = records.flat_map(lambda record: tf.data.Dataset.from_tensors(record).repeat(self._repeats))
        return records.take(self.steps_per_epoch * self._share).batch(self._share, drop_remainder=True).skip(skip)


class EvalLoader:
    """One pass over a split in its own order, every example once on any number of hosts.

    Each host gets an equal number of batches; rows that only fill up have mask False.
    """

    def __init__(self, source: Source, transform: Transform, *, batch_size: int, host: Host = ONLY_HOST) -> None:
        if batch_size % host.count:
            raise ValueError(f"batch_size={batch_size} must be a multiple of the {host.count} hosts")
        self._source, self._transform, self._host = source, transform, host
        self._rows = batch_size // host.count
        self.num_examples = source.num_examples
        self.steps_per_epoch = math.ceil(math.ceil(source.num_examples / host.count) / self._rows)

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This host's rows of the batches from number `start_step` on."""

        def prepare(entry: Entry) -> Record:
            record = self._source.fetch(entry)
            image = self._transform(record["image"], tf.zeros(2, tf.int64))
            return {"image": image, "label": record["label"], "mask": tf.constant(True)}

        records = self._source.reader(self._host.index, self._host.count)()
        examples = records.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        blank = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), examples.element_spec)
        examples = examples.concatenate(tf.data.Dataset.from_tensors(blank).repeat())
        batches = examples.batch(self._rows, drop_remainder=True).take(self.steps_per_epoch)
        batches = batches.skip(start_step).prefetch(tf.data.AUTOTUNE)
        return name_damage(batches.as_numpy_iterator(), self._source)


def train_transform(
    size: int,
    *,
    crop: str,
    min_area: float,
    flip: bool,
    shift: int,
    rand_augment: str,
    method: str,
    antialias: bool,
) -> Transform:
    """(encoded image, seed) -> augmented uint8 [size, size, 3]: crop, flip, shift, RandAugment, in this order."""
    policy = augment.parse_rand_augment(rand_augment) if rand_augment else None

    def cropped(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return ops.random_resized_crop(encoded, seed, size=size, method=method, antialias=antialias, min_area=min_area)

    def whole(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        return ops.resize(ops.decode(encoded), (size, size), method=method, antialias=antialias)

    crops = {"random_resized": cropped, "whole": whole}
    if crop not in crops:
        raise ValueError(f"data.crop={crop!r} is not one of {', '.join(crops)}")
    take = crops[crop]

    def transform(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        image = take(encoded, ops.fold_in(seed, 0))
        if flip:
            image = ops.random_flip(image, ops.fold_in(seed, 1))
        if shift:
            image = ops.random_shift(image, ops.fold_in(seed, 2), pixels=shift)
        if policy is not None:
            image = augment.rand_augment(image, ops.fold_in(seed, 3), interpolation=method, **policy)
        return image

    return transform


def eval_transform(size: int, *, share: float, method: str) -> Transform:
    """(encoded image, unused seed) -> uint8 [size, size, 3]: resize the short side, cut out the middle."""
    return lambda encoded, seed: ops.central_crop(ops.decode(encoded), size=size, share=share, method=method)


def read_image(path: str, transform: Transform) -> np.ndarray:
    """The image of a file (JPEG, PNG, GIF, BMP), transformed: uint8 [size, size, 3].

    Raises:
        ValueError: the file cannot be read, or is no such image.
    """
    try:
        return transform(tf.io.read_file(path), tf.zeros(2, tf.int64)).numpy()
    except tf.errors.OpError as error:
        raise ValueError(f"{path} is no image that can be read: {str(error.message).splitlines()[0]}") from error


def _concatenate(*parts: Record) -> Record:
    return {name: tf.concat([part[name] for part in parts], 0) for name in parts[0]}


def _checked(interpolation: str) -> str:
    if interpolation not in ops.RESIZE_METHODS:
        raise ValueError(f"data.interpolation={interpolation!r} is not one of {', '.join(ops.RESIZE_METHODS)}")
    return interpolation
