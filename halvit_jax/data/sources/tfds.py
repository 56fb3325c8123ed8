"""Data sets prepared by TFDS: TFRecord, ArrayRecord, and small ones kept in memory."""

import bisect
import contextlib
import io
import itertools
import json
import logging
import os
import resource
import shlex
import tempfile
from collections.abc import Callable, Iterator

import tensorflow as tf
import tensorflow_datasets as tfds

from halvit_jax import storage
from halvit_jax.data import ops
from halvit_jax.data.sources import digits  # registers the builder `digits` with TFDS
from halvit_jax.data.sources.base import RECORD_HINT, Entry, Record, Source, position_shard, shard_bounds
from halvit_jax.protocols import DataError, DatasetInfo
from halvit_jax.text import first_few

EMBEDDED = (digits.Digits.name,)  # prepared on first use, in seconds
LABELS = ("label", "real_label")  # one class, or a sequence of all that are right (ImageNet-ReaL)
MEMORY_BYTES = 256 * 2**20  # a data set up to this size is kept in memory
INFO_FILE = "dataset_info.json"  # by which TFDS knows a prepared data set
OPEN_FILES = 4  # TFRecord files a shard mixes while reading


class TfrecordSource(Source):
    """A split that TFDS prepared as TFRecord: files that can only be read in sequence.

    A corrupt file, or one with fewer records than its metadata says, ends the reading with an error; an epoch is never
    silently shorter.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str) -> None:
        self._builder = builder
        self._files = builder.info.splits[split].file_instructions
        self.info = _info(builder, split)

    def shard(self, index: tf.Tensor | int, count: int, seed: tf.Tensor | None = None) -> tf.data.Dataset:
        """The serialized records of a shard; a seed shuffles its files and mixes their records."""
        names = tf.constant([file.filename for file in self._files], tf.string)
        skips = tf.constant([file.skip for file in self._files], tf.int64)
        takes = tf.constant([file.take for file in self._files], tf.int64)
        begins = tf.cumsum(takes, exclusive=True)  # position in the split of each file's first record
        start, stop = shard_bounds(self.info.num_examples, index, count)
        first = tf.maximum(start - begins, 0)
        length = tf.minimum(stop - begins, takes) - first
        own = length > 0
        files = tf.data.Dataset.from_tensor_slices((names[own], (skips + first)[own], length[own]))
        if seed is None:
            return files.flat_map(ops.no_autograph(self._open_file))
        return files.shuffle(len(self._files), seed=seed).interleave(ops.no_autograph(self._open_file), OPEN_FILES)

    def fetch(self, entry: Entry) -> Record:
        """The record that the entry holds."""
        name = tf.strings.join([entry["file"], ", record ", tf.strings.as_string(entry["number"])])
        return _parse(self._builder, entry["serialized"], name, self.info)

    def diagnose(self, error: tf.errors.OpError) -> str:
        """Name the corrupt file of a data loss, whose own message does not."""
        if not isinstance(error, tf.errors.DataLossError):
            return ""
        return f"{self._corrupt_file()} is damaged ({ops.reason(error)}); prepare the data set again"

    def _corrupt_file(self) -> str:
        """The first file of the split that cannot be read to its end.

        Reads them all, the smallest first because it may be truncated.
        """
        for file in sorted((file.filename for file in self._files), key=lambda file: tf.io.gfile.stat(file).length):
            try:
                tf.data.TFRecordDataset(file).reduce(0, lambda count, _: count + 1)
            except tf.errors.DataLossError:
                return file
        return f"a file of {self._builder.data_dir}"  # all could be read this time

    def _open_file(self, file: tf.Tensor, skip: tf.Tensor, take: tf.Tensor) -> tf.data.Dataset:
        """`take` records of a file from number `skip` on; an error where it has fewer."""

        def too_few(last: tf.Tensor) -> tf.Tensor:
            last = tf.strings.as_string(last)
            with tf.control_dependencies([tf.debugging.Assert(False, [file, "ends before its record", last])]):
                return tf.constant(b"")

        too_short = tf.data.Dataset.from_tensors(skip + take - 1).map(ops.no_autograph(too_few))
        records = tf.data.TFRecordDataset(file).skip(skip).take(take).concatenate(too_short).take(take)
        numbers = tf.data.Dataset.range(skip, skip + take)

        def entry(number: tf.Tensor, serialized: tf.Tensor) -> Entry:
            return {"serialized": serialized, "file": file, "number": number}

        return tf.data.Dataset.zip((numbers, records)).map(ops.no_autograph(entry))


class InMemorySource(Source):
    """A small split, read once and kept; an entry is the position in it.

    A seed does not shuffle, because the loader shuffles records as well.
    """

    def __init__(self, source: TfrecordSource) -> None:
        self._source = source
        self._records: Entry = {}  # all entries of the source, each field one tensor; read when a shard is opened
        self.info = source.info

    def shard(self, index: tf.Tensor | int, count: int, seed: tf.Tensor | None = None) -> tf.data.Dataset:
        """The positions of a shard.

        Raises:
            DataError: a file is corrupt or too short.
        """
        del seed
        if not self._records:
            with tf.init_scope():  # a shard may be opened inside of a tf.data function
                entries = self._source.shard(0, 1).batch(self.info.num_examples)
                try:
                    self._records = entries.get_single_element()
                except tf.errors.OpError as error:
                    found = self._source.diagnose(error) or f"{ops.reason(error)}; {RECORD_HINT}"
                    raise DataError(found) from error
        return position_shard(self.info.num_examples, index, count)

    def fetch(self, entry: Entry) -> Record:
        """The record at the entry's position."""
        return self._source.fetch(
            {name: tf.gather(column, entry["position"]) for name, column in self._records.items()}
        )


class ArrayRecordSource(Source):
    """A split that TFDS prepared as ArrayRecord: random access to records, so an entry is a position."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str) -> None:
        self._builder = builder
        self.info = _info(builder, split)
        self._files = builder.info.splits[split].file_instructions
        self._ends = list(itertools.accumulate(file.take for file in self._files))
        raise_open_file_limit(len(self._files))  # each stays open; ImageNet's 1024 files reach the usual limit
        self._serialized = builder.as_data_source(split).data_source  # position -> serialized example

    def shard(self, index: tf.Tensor | int, count: int, seed: tf.Tensor | None = None) -> tf.data.Dataset:
        """The positions of a shard; a seed shuffles them uniformly."""
        return position_shard(self.info.num_examples, index, count, seed)

    def fetch(self, entry: Entry) -> Record:
        """The record at the entry's position."""
        serialized, name = tf.numpy_function(self._read, [entry["position"]], (tf.string, tf.string), stateful=False)
        return _parse(self._builder, tf.ensure_shape(serialized, []), tf.ensure_shape(name, []), self.info)

    def _read(self, position: int) -> tuple[bytes, bytes]:
        index = bisect.bisect_right(self._ends, position)
        file = self._files[index]
        name = f"{file.filename}, record {file.skip + position - (self._ends[index] - file.take)}"
        try:
            return self._serialized[position], name.encode()
        except Exception as error:  # of any type that array_record raises; none of them names the file
            raise ValueError(f"{name} cannot be read: {error}") from error


def open_tfds(name: str, data_dir: str, split: str, root: str = "") -> Source:
    """The split of the prepared TFDS data set `name` under `data_dir`; embedded ones are prepared where missing.

    Raises:
        ValueError: no such data set or split, not or only partly prepared, or without `image` and `label`.
    """
    if root:
        raise ValueError(f"data.root={root!r} is for data.name='folder', and data.name={name!r}; set one or the other")
    try:
        if name in EMBEDDED and storage.is_bucket(data_dir):
            _prepare_in_bucket(name, data_dir)
        with _quiet():
            builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None, try_gcs=False)
            prepared = builder.is_prepared()
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise ValueError(
            f"data.name={name!r} is not a data set that TFDS knows: {str(error).splitlines()[0]}"
        ) from error
    except (tf.errors.OpError, RuntimeError) as error:  # a bucket without access
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"data.data_dir={data_dir} cannot be read ({reason}); name another one") from error
    if not prepared:
        if builder.name not in EMBEDDED:
            raise ValueError(
                f"data.name={name!r} is not prepared in data.data_dir={builder.data_dir}; prepare it with: "
                f"{_command(builder)}"
            )
        tfds.disable_progress_bar()
        with _quiet():
            builder.download_and_prepare(file_format="tfrecord")
    _validate(builder, split)
    return FORMATS[builder.info.file_format.value](builder, split)


def _prepare_in_bucket(name: str, data_dir: str) -> None:
    """Prepare a data set on the disk and copy it, the file that makes it a data set last.

    TFDS renames a folder, which a process that is killed leaves half done in a bucket.
    """
    with tempfile.TemporaryDirectory() as made:
        builder = tfds.builder(name, data_dir=made, try_gcs=False)
        target = os.path.join(data_dir, builder.info.full_name)
        if tf.io.gfile.exists(os.path.join(target, INFO_FILE)):
            return
        builder.download_and_prepare(file_format="tfrecord")
        for file in sorted(os.listdir(builder.data_dir), key=lambda file: (file == INFO_FILE, file)):
            tf.io.gfile.copy(os.path.join(builder.data_dir, file), os.path.join(target, file), overwrite=True)


def raise_open_file_limit(count: int) -> None:
    """Raise this process's limit of open files by `count`, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what TFDS prints and warns of itself: the messages of this file say what matters of it."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _tfrecord(builder: tfds.core.DatasetBuilder, split: str) -> Source:
    source = TfrecordSource(builder, split)
    return source if builder.info.dataset_size > MEMORY_BYTES else InMemorySource(source)


FORMATS: dict[str, Callable[[tfds.core.DatasetBuilder, str], Source]] = {
    "tfrecord": _tfrecord,
    "array_record": ArrayRecordSource,
}


def _validate(builder: tfds.core.DatasetBuilder, split: str) -> None:
    features = set(builder.info.features)
    missing = {"image"} - features | (set() if features & set(LABELS) else {"label"})
    if missing:
        raise ValueError(
            f"data.name={builder.name!r} lacks the feature {' and '.join(sorted(missing))}; "
            f"it has {', '.join(builder.info.features)}"
        )
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
            f"{_command(builder)}"
        )


def _command(builder: tfds.core.DatasetBuilder) -> str:
    """The command that prepares a data set. Not `tfds build`, which asks for Apache Beam."""
    name, *config, version = builder.info.full_name.split("/")
    # TFDS does not expand "~" where it prepares, so the folder is written out.
    folder = os.fspath(builder.data_dir).removesuffix(f"/{builder.info.full_name}")
    folder = folder if "://" in folder else os.path.abspath(os.path.expanduser(folder))
    if name == "imagenet2012":
        return f"bash launch/prepare_imagenet.sh TARS_DIR {shlex.quote(folder)}"
    made = f"tfds.builder({json.dumps('/'.join([name, *config]) + ':' + version)}, data_dir={json.dumps(folder)})"
    return f"python -c {shlex.quote(f'import tensorflow_datasets as tfds; {made}.download_and_prepare()')}"


def _info(builder: tfds.core.DatasetBuilder, split: str) -> DatasetInfo:
    label = builder.info.features[_label(builder)]
    several = isinstance(label, tfds.features.Sequence)
    names, extra = (label.feature.names, {"several_labels": True}) if several else (label.names, {})
    return DatasetInfo(list(names), builder.info.splits[split].num_examples, builder.name, extra)


def _label(builder: tfds.core.DatasetBuilder) -> str:
    """The feature that holds the class, or all classes."""
    return next(name for name in LABELS if name in builder.info.features)


def _parse(builder: tfds.core.DatasetBuilder, serialized: tf.Tensor, name: tf.Tensor, info: DatasetInfo) -> Record:
    """The record of a labelled image; several labels are bool [classes], True where the class is right.

    Raises:
        tf.errors.InvalidArgumentError: the label is not a class; training on it would be silently wrong.
    """
    example = builder.info.features.deserialize_example(serialized, decoders={"image": tfds.decode.SkipDecoding()})
    label, classes = tf.cast(example[_label(builder)], tf.int32), len(info.class_names)
    message = [name, "has the label", label, "outside of", classes, "classes"]
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all((label >= 0) & (label < classes)), message)]):
        label = tf.identity(label)
    if label.shape.rank:
        label = tf.reduce_any(tf.one_hot(label, classes, True, False, dtype=tf.bool), 0)
    return {"image": example["image"], "label": label, "name": name}
