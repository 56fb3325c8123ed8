"""From records to batches: order, seeds, resume, batching, padding and mask.

The order of examples is a function of (seed, epoch), their augmentation of (seed, epoch, number of the example in the
epoch). So the batch of any step can be computed, and a checkpoint holds no data state.

Elastic: the split is cut into a fixed number of virtual shards, each of which fills a fixed part of every global batch.
A host owns shards / hosts of them, in order. So the global batch of a step is the same on 1, 2, 4 ... hosts.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from halvit_jax.data import ops
from halvit_jax.data.errors import ErrorTracker
from halvit_jax.data.sources import open_sources
from halvit_jax.data.sources.balanced import BalancedSource
from halvit_jax.data.sources.base import Entry, Source
from halvit_jax.data.transforms import Example, Transform, eval_transform, train_transform
from halvit_jax.protocols import DatasetInfo, Loader


class Host(NamedTuple):
    """The index of this process and the number of processes, each of which reads its own rows of a batch."""

    index: int = 0
    count: int = 1


ONLY_HOST = Host()


class Loaders(NamedTuple):
    """The training loader (None without training), the evaluation loaders and the `DatasetInfo` of the training set.

    Without training it is that of "eval". `evals` starts with "eval", by which the best checkpoint is chosen;
    the set `v2` of data.evals is "eval_v2".
    """

    train: Loader | None
    evals: dict[str, Loader]
    info: DatasetInfo


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
    train_size: int,
    eval_crop: float,
    eval_resize: str,
    exif_rotation: bool,
    on_bad_image: str,
    bad_image_budget: float,
    balance: float,
    repeated_aug: int,
    virtual_shards: int,
    shuffle_buffer: int,
    batch_size: int,
    size: tuple[int, int],
    seed: int,
    channels: int = 3,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    host: Host = ONLY_HOST,
    training: bool = True,
) -> Loaders:
    """The loaders of `config.data`, whose fields explain the keywords; `size` is (height, width) of the images.

    With one channel they are grey: the brightness of the colours, after all augmentation. `mean` is that of the
    channels, for augmentation. Without `training` no training data are needed.

    Raises:
        ValueError: a value that is not allowed, or a missing data set, with the command that prepares it.
    """
    if train_size < 0:
        raise ValueError(f"data.train_size={train_size} must not be negative")
    for_training = train_transform(
        (train_size, train_size) if train_size else size,
        crop=crop,
        min_area=min_crop_area,
        flip=flip,
        shift=shift,
        policy=augment,
        color_jitter=color_jitter,
        method=interpolation,
        antialias=antialias,
        exif_rotation=exif_rotation,
        channels=channels,
        mean=mean,
        on_bad_image=on_bad_image,
    )
    for_evaluation = eval_transform(
        size,
        fraction=eval_crop,
        method=interpolation,
        resize=eval_resize,
        exif_rotation=exif_rotation,
        channels=channels,
        on_bad_image=on_bad_image,
    )
    if not 0.0 <= bad_image_budget <= 1.0:
        raise ValueError(f"data.bad_image_budget={bad_image_budget} must lie between 0 and 1")
    split = train_split if training else None
    train_source, eval_sources = open_sources(name, data_dir, root, split, eval_name, eval_split, evals)
    sizes = {"batch_size": batch_size, "bad_image_budget": bad_image_budget, "host": host}
    loaders = {key: EvalLoader(source, for_evaluation, **sizes) for key, source in eval_sources.items()}
    if train_source is None:
        return Loaders(None, loaders, eval_sources["eval"].info)
    train = TrainLoader(
        BalancedSource(train_source, balance) if balance else train_source,
        for_training,
        seed=seed,
        virtual_shards=virtual_shards,
        shuffle_buffer=shuffle_buffer,
        repeated_aug=repeated_aug,
        **sizes,
    )
    return Loaders(train, loaders, train_source.info)


class TrainLoader:
    """Endless shuffled batches, a function of seed and step (see the top of this file).

    An epoch has as many full batches as every virtual shard can fill; the examples left out differ between epochs.
    With `repeated_aug` > 1 an epoch takes 1 / repeated_aug of the examples, each that many times in a row, augmented
    differently.
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
        self._shards = math.gcd(batch_size, virtual_shards)  # so that every shard fills an equal part of the batch
        if self._shards % host.count:
            raise ValueError(
                f"{host.count} hosts cannot share {self._shards} virtual shards equally; make batch_size={batch_size} "
                f"and data.virtual_shards={virtual_shards} multiples of the number of hosts"
            )
        if repeated_aug < 1:
            raise ValueError(f"data.repeated_aug={repeated_aug} must be at least 1")
        self._source, self._transform = source, transform
        self._batch_size, self._seed, self._repeats, self._host = batch_size, seed, repeated_aug, host
        self._rows_per_shard = batch_size // self._shards  # of a global batch
        self._budget = bad_image_budget
        self._buffer = max(shuffle_buffer // self._shards, 1)
        self.info, self.num_examples = source.info, source.info.num_examples
        self.steps_per_epoch = self.num_examples // self._shards // self._rows_per_shard
        if not self.steps_per_epoch:
            fits = 2 ** int(math.log2(self.num_examples))
            raise ValueError(
                f"batch_size={batch_size} in data.virtual_shards={virtual_shards} needs more than the "
                f"{self.num_examples} examples of data.train_split; set e.g. batch_size={fits} and "
                "data.virtual_shards=1"
            )

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This host's rows of the batches from `start_step` on, without end.

        Starting inside an epoch reads that epoch's records up to there, undecoded.
        """
        rows = self._batch_size // self._host.count
        examples = self._entries(start_step).map(
            ops.no_autograph(self._prepare), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        batches = examples.batch(rows, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
        tracker = ErrorTracker(
            self._source, self._prepare, self._replay, budget=self._budget, steps_per_epoch=self.steps_per_epoch
        )
        return tracker.batches(batches.as_numpy_iterator(), start_step)

    def _entries(self, start_step: int) -> tf.data.Dataset:
        """(epoch, number among this host's rows of the epoch, entry) from the first row of a step on."""
        first_epoch, skipped = divmod(start_step, self.steps_per_epoch)
        own = self._shards // self._host.count
        first = self._host.index * own
        rows = own * self._rows_per_shard

        def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
            skip = tf.where(epoch == first_epoch, tf.constant(skipped, tf.int64), tf.constant(0, tf.int64))

            def one_shard(index: tf.Tensor) -> tf.data.Dataset:
                return self._shuffled_shard(index, epoch, skip)

            shards = tf.data.Dataset.range(first, first + own)
            entries = shards.interleave(
                ops.no_autograph(one_shard), cycle_length=own, block_length=self._rows_per_shard
            )
            return entries.enumerate(skip * rows).map(ops.no_autograph(lambda n, entry: (epoch, n, entry)))

        return tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max).flat_map(ops.no_autograph(one_epoch))

    def _shuffled_shard(self, index: tf.Tensor, epoch: tf.Tensor, skip: tf.Tensor) -> tf.data.Dataset:
        """The entries of a shard in the order of an epoch, from those of batch number `skip` on."""
        seed = ops.fold_in(tf.stack([epoch, tf.constant(self._seed, tf.int64)]), index)
        entries = self._source.shard(index, self._shards, seed[0]).shuffle(self._buffer, seed=seed[0])
        if self._repeats > 1:
            entries = entries.flat_map(
                ops.no_autograph(lambda entry: tf.data.Dataset.from_tensors(entry).repeat(self._repeats))
            )
        return entries.take(self.steps_per_epoch * self._rows_per_shard).skip(skip * self._rows_per_shard)

    def _prepare(self, epoch: tf.Tensor, n: tf.Tensor, entry: Entry) -> Example:
        rows = self._batch_size // self._host.count
        step, row = n // rows, n % rows
        number = step * self._batch_size + self._host.index * rows + row  # of the example in the epoch
        example = self._transform(self._source.fetch(entry), tf.stack([epoch + (self._seed << 32), number]))
        return {**example, "mask": example["decoded"]}  # a grey replacement is not trained on

    def _replay(self, step: int) -> Iterator[tuple]:
        yield from self._entries(step).take(self._batch_size // self._host.count)


class EvalLoader:
    """One pass over a split in its own order, every example once on any number of hosts.

    Each host gets an equal number of batches; padding rows have mask False.
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
        self.info, self.num_examples = source.info, source.info.num_examples
        self.steps_per_epoch = math.ceil(math.ceil(self.num_examples / host.count) / self._rows)

    def batches(self, start_step: int = 0, *, names: bool = False) -> Iterator[dict[str, np.ndarray]]:
        """This host's rows of the batches from number `start_step` on; with `names` of the records, as bytes."""
        examples = self._entries().map(
            ops.no_autograph(self._prepare), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        filling = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), examples.element_spec)
        filling["decoded"] = tf.constant(True)
        examples = examples.concatenate(tf.data.Dataset.from_tensors(filling).repeat())
        batches = examples.batch(self._rows, drop_remainder=True).take(self.steps_per_epoch)
        batches = batches.skip(start_step).prefetch(tf.data.AUTOTUNE)
        tracker = ErrorTracker(
            self._source, self._prepare, self._replay, budget=self._budget, steps_per_epoch=self.steps_per_epoch
        )
        return tracker.batches(batches.as_numpy_iterator(), start_step, names=names)

    def _entries(self) -> tf.data.Dataset:
        return self._source.shard(self._host.index, self._host.count)

    def _prepare(self, entry: Entry) -> Example:
        example = self._transform(self._source.fetch(entry), tf.zeros(2, tf.int64))
        # A grey replacement is scored too, so that every example counts.
        return {**example, "mask": tf.constant(True)}

    def _replay(self, step: int) -> Iterator[tuple]:
        for entry in self._entries().skip(step * self._rows).take(self._rows):
            yield (entry,)
