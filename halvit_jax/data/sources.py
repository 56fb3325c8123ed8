"""Where examples come from: data sets prepared by TFDS, read as undecoded records."""

from collections.abc import Callable

import tensorflow as tf
import tensorflow_datasets as tfds

from halvit_jax.data import digits  # registers the builder `digits` with TFDS

EMBEDDED = (digits.Digits.name,)  # made on the spot where they are missing, in seconds
CACHE_BYTES = 256 * 2**20  # a data set up to this size stays in memory after its first reading
OPEN_FILES = 4  # files a reader mixes while reading

Record = dict[str, tf.Tensor]
Reader = Callable[..., tf.data.Dataset]  # (seed: scalar tensor | None) -> the records of one part


class Source:
    """One split of a prepared TFDS data set with the features `image` and `label`.

    A record is {"image": encoded bytes, "label": int}: skipping one costs no decoding.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str) -> None:
        self._builder = builder
        self._split = split
        self.num_examples: int = builder.info.splits[split].num_examples
        self.class_names: list[str] = list(builder.info.features["label"].names)

    def reader(self, part: int, parts: int) -> Reader:
        """A function of a seed that reads one of `parts` nearly equal, consecutive parts of the split.

        With a seed the files of the part come in a random order and mixed; without, as they were written. A small data
        set is kept in memory and comes in its own order, for the caller shuffles records anyway.
        """
        instructions = self._builder.info.splits[tfds.even_splits(self._split, parts)[part]].file_instructions
        names, skips, takes = ([getattr(i, field) for i in instructions] for field in ("filename", "skip", "take"))
        files = tf.data.Dataset.from_tensor_slices(
            (tf.constant(names, tf.string), tf.constant(skips, tf.int64), tf.constant(takes, tf.int64))
        )

        def open_file(name: tf.Tensor, skip: tf.Tensor, take: tf.Tensor) -> tf.data.Dataset:
            return tf.data.TFRecordDataset(name).skip(skip).take(take)

        def in_order() -> tf.data.Dataset:
            return files.flat_map(open_file).map(self._parse)

        def shuffled(seed: tf.Tensor | None = None) -> tf.data.Dataset:
            if seed is None:
                return in_order()
            mixed = files.shuffle(max(len(names), 1), seed=seed).interleave(open_file, OPEN_FILES)
            return mixed.map(self._parse)

        if self._builder.info.dataset_size > CACHE_BYTES:
            return shuffled
        cached = in_order().cache()
        return lambda seed=None: cached

    def part_size(self, parts: int) -> int:
        """Examples that every one of `parts` parts has at least."""
        return self.num_examples // parts

    def _parse(self, serialized: tf.Tensor) -> Record:
        example = self._builder.info.features.deserialize_example(
            serialized, decoders={"image": tfds.decode.SkipDecoding()}
        )
        return {"image": example["image"], "label": tf.cast(example["label"], tf.int32)}


def open_source(name: str, data_dir: str, split: str) -> Source:
    """The split of the prepared TFDS data set `name` under `data_dir` ("": TFDS's own default).

    The embedded sets are prepared where they are missing; nothing is ever downloaded.

    Raises:
        ValueError: no such data set or split, not prepared, or without `image` and `label`.
    """
    folder = data_dir or None
    try:
        builder = tfds.builder(name, data_dir=folder, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise ValueError(f"data.name={name!r} is no data set that TFDS knows: {str(error).splitlines()[0]}") from error
    if not builder.is_prepared():
        if builder.name not in EMBEDDED:
            raise ValueError(
                f"data.name={name!r} is not prepared in data.data_dir={builder.data_dir}; prepare it with: "
                f"tfds build {builder.name} --data_dir={data_dir or '~/tensorflow_datasets'}"
            )
        builder.download_and_prepare(file_format="tfrecord")
    return Source(builder, _checked_split(builder, split))


def _checked_split(builder: tfds.core.DatasetBuilder, split: str) -> str:
    missing = {"image", "label"} - set(builder.info.features)
    if missing:
        raise ValueError(f"data.name={builder.name!r} lacks the feature {' and '.join(sorted(missing))}")
    if builder.info.file_format.value != "tfrecord":
        raise ValueError(f"data.name={builder.name!r} is prepared as {builder.info.file_format.value}, not as tfrecord")
    try:
        builder.info.splits[split]
    except (ValueError, KeyError) as error:
        known = ", ".join(builder.info.splits)
        raise ValueError(f"split {split!r} of data.name={builder.name!r} is unknown; it has {known}") from error
    return split
