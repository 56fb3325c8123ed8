"""Data sets prepared by TFDS: TFRecord, ArrayRecord, and small ones kept in memory."""

import bisect
import itertools
import os
import resource
from collections.abc import Callable

import tensorflow as tf
import tensorflow_datasets as tfds

from halvit_jax.data import ops
from halvit_jax.data.sources import digits  # registers the builder `digits` with TFDS
from halvit_jax.data.sources.base import (
    MEND_RECORD,
    Entry,
    Reader,
    Record,
    Source,
    bounds,
    checked,
    positions,
)
from halvit_jax.protocols import DataError
from halvit_jax.text import first_few

EMBEDDED = (digits.Digits.name,)  # made on the spot where they are missing, in seconds
MEMORY_BYTES = 256 * 2**20  # a data set up to this size is kept in memory
OPEN_FILES = 4  # TFRecord files a reader mixes while reading


class TfrecordSource:
    """A split that TFDS prepared as TFRecord: files that can only be read one after the other.

    A file that is damaged or has fewer records than its metadata says ends the reading with an error; an epoch is
    never silently shorter.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str) -> None:
        self._builder = builder
        self._split = split
        self.num_examples: int = builder.info.splits[split].num_examples
        self.class_names: list[str] = list(builder.info.features["label"].names)

    def reader(self, parts: int) -> Reader:
        """A function of a number below `parts`, and a seed, that reads this part of the split.

        With a seed the files of the part come in a random order and mixed; without, as they were written.
        """
        files = self._builder.info.splits[self._split].file_instructions
        names = tf.constant([file.filename for file in files], tf.string)
        skips = tf.constant([file.skip for file in files], tf.int64)
        takes = tf.constant([file.take for file in files], tf.int64)
        begins = tf.cumsum(takes, exclusive=True)  # the place in the split of each file's first record

        def read(part: tf.Tensor | int, seed: tf.Tensor | None = None) -> tf.data.Dataset:
            start, stop = bounds(self.num_examples, part, parts)
            first = tf.maximum(start - begins, 0)
            count = tf.minimum(stop - begins, takes) - first
            own = count > 0
            files = tf.data.Dataset.from_tensor_slices((names[own], (skips + first)[own], count[own]))
            if seed is None:
                return files.flat_map(ops.plain(self._open_file))
            return files.shuffle(len(names), seed=seed).interleave(ops.plain(self._open_file), OPEN_FILES)

        return read

    def fetch(self, entry: Entry) -> Record:
        """The entry's own record."""
        example = _parse(self._builder, entry["serialized"])
        name = tf.strings.join([entry["file"], ", record ", tf.strings.as_string(entry["number"])])
        return checked(example["image"], example["label"], name, len(self.class_names))

    def blame(self, error: tf.errors.OpError) -> str:
        """What is wrong with which file, after an error in reading them."""
        if isinstance(error, tf.errors.DataLossError):  # which does not name it
            return f"{self._damaged_file()} is damaged ({ops.reason(error)}); prepare the data set again"
        return f"{ops.reason(error)}; {MEND_RECORD}"

    def _damaged_file(self) -> str:
        """The first file of the split that cannot be read to its end.

        Reads them all, the smallest first because it may be cut off.
        """
        files = (file.filename for file in self._builder.info.splits[self._split].file_instructions)
        for file in sorted(files, key=lambda file: tf.io.gfile.stat(file).length):
            try:
                tf.data.TFRecordDataset(file).reduce(0, lambda count, _: count + 1)
            except tf.errors.DataLossError:
                return file
        return f"a file of {self._builder.data_dir}"  # it could be read this time

    def _open_file(self, file: tf.Tensor, skip: tf.Tensor, take: tf.Tensor) -> tf.data.Dataset:
        """`take` records of a file from number `skip` on; an error where it has fewer."""

        def too_few(last: tf.Tensor) -> tf.Tensor:
            last = tf.strings.as_string(last)
            with tf.control_dependencies([tf.debugging.Assert(False, [file, "ends before its record", last])]):
                return tf.constant(b"")

        too_short = tf.data.Dataset.from_tensors(skip + take - 1).map(ops.plain(too_few))
        records = tf.data.TFRecordDataset(file).skip(skip).take(take).concatenate(too_short).take(take)
        numbers = tf.data.Dataset.range(skip, skip + take)

        def entry(number: tf.Tensor, serialized: tf.Tensor) -> Entry:
            return {"serialized": serialized, "file": file, "number": number}

        return tf.data.Dataset.zip((numbers, records)).map(ops.plain(entry))


class InMemory:
    """A small split that is read once and kept, so an entry is the position in it.

    It comes in its own order whatever the seed, for the caller shuffles records anyway.
    """

    def __init__(self, source: TfrecordSource) -> None:
        self._source = source
        self._records: Entry = {}  # all entries of the source, each field one tensor; read when a reader is made
        self.num_examples, self.class_names = source.num_examples, source.class_names

    def reader(self, parts: int) -> Reader:
        """A function of a number below `parts` that gives the positions of this part.

        Raises:
            DataError: a file is damaged or too short.
        """
        if not self._records:
            entries = self._source.reader(1)(0).batch(self.num_examples)
            try:
                self._records = entries.get_single_element()
            except tf.errors.OpError as error:
                raise DataError(self._source.blame(error)) from error
        read = positions(self.num_examples, parts)
        return lambda part, seed=None: read(part)

    def fetch(self, entry: Entry) -> Record:
        """The record at the entry's position."""
        return self._source.fetch(
            {name: tf.gather(column, entry["position"]) for name, column in self._records.items()}
        )


class ArrayRecordSource:
    """A split that TFDS prepared as ArrayRecord: any record can be read at any time, so an entry is its position."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str) -> None:
        self._builder = builder
        self.num_examples: int = builder.info.splits[split].num_examples
        self.class_names: list[str] = list(builder.info.features["label"].names)
        self._files = builder.info.splits[split].file_instructions
        self._ends = list(itertools.accumulate(file.take for file in self._files))
        _allow_open_files(len(self._files))  # each stays open, and the usual limit is as low as ImageNet's 1024
        self._serialized = builder.as_data_source(split).data_source  # position -> serialized example

    def reader(self, parts: int) -> Reader:
        """A function of a number below `parts`, and a seed, that gives this part's positions in any possible order."""
        return positions(self.num_examples, parts)

    def fetch(self, entry: Entry) -> Record:
        """The record at the entry's position."""
        serialized, name = tf.numpy_function(self._read, [entry["position"]], (tf.string, tf.string), stateful=False)
        example = _parse(self._builder, tf.ensure_shape(serialized, []))
        return checked(example["image"], example["label"], tf.ensure_shape(name, []), len(self.class_names))

    def _read(self, position: int) -> tuple[bytes, bytes]:
        index = bisect.bisect_right(self._ends, position)
        file = self._files[index]
        name = f"{file.filename}, record {file.skip + position - (self._ends[index] - file.take)}"
        try:
            return self._serialized[position], name.encode()
        except Exception as error:  # array_record raises what it likes; none of it names the file
            raise ValueError(f"{name} cannot be read: {error}") from error


def open_tfds(name: str, data_dir: str, split: str) -> Source:
    """The split of the prepared TFDS data set `name` under `data_dir`; embedded ones are prepared where missing.

    Raises:
        ValueError: no such data set or split, not or only partly prepared, or without `image` and `label`.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise ValueError(f"data.name={name!r} is no data set that TFDS knows: {str(error).splitlines()[0]}") from error
    if not builder.is_prepared():
        if builder.name not in EMBEDDED:
            raise ValueError(
                f"data.name={name!r} is not prepared in data.data_dir={builder.data_dir}; prepare it with: "
                f"{_command(builder, data_dir)}"
            )
        builder.download_and_prepare(file_format="tfrecord")
    _check(builder, split, data_dir)
    return FORMATS[builder.info.file_format.value](builder, split)


def _tfrecord(builder: tfds.core.DatasetBuilder, split: str) -> Source:
    source = TfrecordSource(builder, split)
    return source if builder.info.dataset_size > MEMORY_BYTES else InMemory(source)


FORMATS: dict[str, Callable[[tfds.core.DatasetBuilder, str], Source]] = {
    "tfrecord": _tfrecord,
    "array_record": ArrayRecordSource,
}


def _check(builder: tfds.core.DatasetBuilder, split: str, data_dir: str) -> None:
    missing = {"image", "label"} - set(builder.info.features)
    if missing:
        raise ValueError(f"data.name={builder.name!r} lacks the feature {' and '.join(sorted(missing))}")
    file_format = builder.info.file_format.value
    if file_format not in FORMATS:
        raise ValueError(f"data.name={builder.name!r} is prepared as {file_format}, not as {' or '.join(FORMATS)}")
    try:
        files = {os.path.basename(file.filename) for file in builder.info.splits[split].file_instructions}
    except (ValueError, KeyError) as error:
        known = ", ".join(builder.info.splits)
        raise ValueError(f"split {split!r} of data.name={builder.name!r} is unknown; it has {known}") from error
    lost = sorted(files - set(tf.io.gfile.listdir(os.fspath(builder.data_dir))))
    if lost:
        raise ValueError(
            f"split {split!r} of data.name={builder.name!r} lacks {len(lost)} of {len(files)} files in "
            f"{builder.data_dir}: {first_few(lost)}; remove that folder and prepare again with: "
            f"{_command(builder, data_dir)}"
        )


def _command(builder: tfds.core.DatasetBuilder, data_dir: str) -> str:
    """The command that prepares a data set. Not `tfds build`, which asks for Apache Beam."""
    folder = data_dir or "~/tensorflow_datasets"
    if builder.name == "imagenet2012":
        return f"bash launch/prepare_imagenet.sh TARS_DIR {folder}"
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{builder.info.full_name}', data_dir='{folder}').download_and_prepare()\""
    )


def _parse(builder: tfds.core.DatasetBuilder, serialized: tf.Tensor) -> dict[str, tf.Tensor]:
    example = builder.info.features.deserialize_example(serialized, decoders={"image": tfds.decode.SkipDecoding()})
    return {"image": example["image"], "label": tf.cast(example["label"], tf.int32)}


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files by `count`, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
