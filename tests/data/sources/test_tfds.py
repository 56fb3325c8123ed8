import itertools
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from helpers import own_builders
from helpers.tiers import tiered

from halvit_jax.data.pipeline import EvalLoader, Host, TrainLoader
from halvit_jax.data.sources import open_source
from halvit_jax.data.sources import tfds as tfds_source
from halvit_jax.data.sources.base import Source
from halvit_jax.data.transforms import train_transform
from halvit_jax.protocols import DataError

FORMATS = ("tfrecord", "array_record")
FLIP_AND_SHIFT = {"crop": "whole", "min_area": 1.0, "flip": True, "shift": 1, "policy": "", "color_jitter": 0.0}
TRANSFORM = train_transform((8, 8), **FLIP_AND_SHIFT, method="bilinear", antialias=False)
BUILDERS = pathlib.Path(own_builders.__file__)  # imported, so TFDS knows them


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """File format -> `data_dir` in which the digits lie in four files a split."""
    folders = {}
    for file_format in FORMATS:
        folders[file_format] = tmp_path_factory.mktemp(file_format)
        builder = tfds.builder("digits", data_dir=str(folders[file_format]))
        four = tfds.download.DownloadConfig(num_shards=4)
        builder.download_and_prepare(file_format=file_format, download_config=four)
    return folders


@pytest.fixture
def own(prepared: dict[str, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A copy of both to damage, one folder a file format; large sets are read from their files."""
    monkeypatch.setattr(tfds_source, "MEMORY_BYTES", 0)
    for file_format, folder in prepared.items():
        shutil.copytree(folder, tmp_path / file_format)
    return tmp_path


def shard(folder: pathlib.Path, split: str = "train", number: int = 2) -> pathlib.Path:
    """One of the four files of a split."""
    (path,) = folder.glob(f"digits/*/digits-{split}.*-{number:05d}-of-00004")
    return path


def records(source: Source, part: int = 0, parts: int = 1, seed: int | None = None) -> list[tuple[bytes, int]]:
    """(image, label) of one part, in its order."""
    seed = None if seed is None else tf.constant(seed, tf.int64)
    data = source.shard(part, parts, seed).map(source.fetch)
    return [(record["image"], int(record["label"])) for record in data.as_numpy_iterator()]


def train_loader(source: Source, **changes: Any) -> TrainLoader:
    return TrainLoader(source, TRANSFORM, **{"batch_size": 48, "seed": 0, "virtual_shards": 8, **changes})


def test_tfrecord_and_array_record_hold_the_same_split_in_the_same_order(prepared: dict[str, pathlib.Path]) -> None:
    for split in ("train", "test[10%:90%]"):
        first, second = (open_source("digits", str(prepared[name]), split) for name in FORMATS)
        assert first.info == second.info
        assert records(first) == records(second)


@pytest.mark.parametrize("file_format", FORMATS)
def test_shards_hold_every_record_once_and_in_order(file_format: str, prepared: dict[str, pathlib.Path]) -> None:
    source = open_source("digits", str(prepared[file_format]), "test")
    whole = records(source)
    parts = [records(source, part, 7) for part in range(7)]
    assert [record for part in parts for record in part] == whole
    assert len(whole) == source.info.num_examples == 364
    assert min(map(len, parts)) == 364 // 7


@pytest.mark.parametrize("file_format", FORMATS)
def test_shards_of_a_sum_of_splits_are_equal_and_fill_their_batches(file_format: str, own: pathlib.Path) -> None:
    source = open_source("digits", str(own / file_format), "test[:110]+test[200:353]")
    parts = [records(source, part, 8) for part in range(8)]
    assert [record for part in parts for record in part] == records(source)
    assert list(map(len, parts)) == 7 * [33] + [32]
    loader = train_loader(source, batch_size=32)
    assert loader.steps_per_epoch == 8
    whole, later = (loader.batches(start) for start in (0, 8))
    for step, batch in enumerate(itertools.islice(whole, 16)):
        if step >= 8:  # each epoch has all its steps, so the second begins where a resumed run takes it to begin
            np.testing.assert_array_equal(batch["image"], next(later)["image"])


@pytest.mark.parametrize("file_format", FORMATS)
def test_records_stay_undecoded_and_name_their_file(file_format: str, own: pathlib.Path) -> None:
    source = open_source("digits", str(own / file_format), "test[50:]")
    record = next(iter(source.shard(1, 2).map(source.fetch)))
    assert record["image"].dtype == tf.string
    assert record["image"].numpy().startswith(b"\x89PNG")
    file, number = record["name"].numpy().decode().split(", record ")
    lengths = tfds.builder("digits", data_dir=str(own / file_format)).info.splits["test"].shard_lengths
    place = 50 + 157 - sum(lengths[:2])  # half of the 314 from number 50 on, counted in the third file
    assert (file, int(number)) == (str(shard(own / file_format, "test", 2)), place)


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_seed_shuffles_a_large_set(file_format: str, own: pathlib.Path) -> None:
    source = open_source("digits", str(own / file_format), "test")
    orders = [records(source, 0, 1, seed) for seed in (1, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert orders[1:].count(orders[0]) == 1
    for order in orders:
        assert sorted(order) == sorted(records(source))


def test_array_record_shuffles_uniformly(prepared: dict[str, pathlib.Path]) -> None:
    source = open_source("digits", str(prepared["array_record"]), "test")
    seeds = tf.data.Dataset.range(300)
    first = [int(entry["position"]) for entry in seeds.flat_map(lambda seed: source.shard(0, 4, seed).take(1))]
    assert len(set(first)) > 80  # of 91: the first place is drawn from all
    assert set(first) <= set(range(91))


def test_array_record_batches_are_elastic_and_resume(prepared: dict[str, pathlib.Path]) -> None:
    source = open_source("digits", str(prepared["array_record"]), "train")
    loader = train_loader(source)
    last = loader.steps_per_epoch + 3
    reference = [batch for _, batch in zip(range(last), loader.batches(), strict=False)]  # over the end of an epoch
    hosts = [train_loader(source, host=Host(i, 2)).batches(last - 6) for i in range(2)]
    for batch in reference[last - 6 :]:
        parts = [next(host) for host in hosts]
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), batch[name])
    epoch = np.concatenate([batch["label"] for batch in reference[: loader.steps_per_epoch]])
    assert abs(len(epoch) - source.info.num_examples) < 48


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_missing_file_is_found_when_the_set_is_opened(file_format: str, own: pathlib.Path) -> None:
    lost = shard(own / file_format)
    lost.unlink()
    with pytest.raises(ValueError, match=rf"split 'train' .* lacks 1 of 4 files .*{lost.name}.*prepare again with: py"):
        open_source("digits", str(own / file_format), "train")
    assert open_source("digits", str(own / file_format), "test").info.num_examples == 364


def test_a_file_unknown_to_the_metadata_is_ignored(own: pathlib.Path) -> None:
    for file_format in FORMATS:
        known = shard(own / file_format)
        shutil.copy(known, known.with_name(known.name.replace("00002-of-00004", "00004-of-00005")))
        assert len(records(open_source("digits", str(own / file_format), "train"))) == 1433


def test_metadata_of_another_number_of_files_are_an_error(own: pathlib.Path) -> None:
    for file_format in FORMATS:
        (info,) = (own / file_format).glob("digits/*/dataset_info.json")
        fields = json.loads(info.read_text())
        (train,) = (split for split in fields["splits"] if split["name"] == "train")
        train["shardLengths"] = train["shardLengths"][:3]
        info.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=r"split 'train' .* lacks 3 of 3 files .*00000-of-00003"):
            open_source("digits", str(own / file_format), "train")


def test_a_file_truncated_between_two_records_is_named(own: pathlib.Path) -> None:
    cut = shard(own / "tfrecord")
    whole = list(tf.data.TFRecordDataset(str(cut)).as_numpy_iterator())
    with tf.io.TFRecordWriter(str(cut)) as writer:
        for record in whole[:-1]:
            writer.write(record)
    source = open_source("digits", str(own / "tfrecord"), "train")
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"{cut.name}.*ends before its record.*{len(whole) - 1}"):
        records(source)
    loader = train_loader(source)
    with pytest.raises(DataError, match=rf"{cut.name} ends before its record {len(whole) - 1}; repair it, or"):
        list(zip(range(2 * loader.steps_per_epoch), loader.batches(), strict=False))


@pytest.mark.parametrize("damage", tiered(["cut off", "changed", "empty"], {"cut off"}))
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_corrupt_file_ends_the_epoch_with_its_name(file_format: str, damage: str, own: pathlib.Path) -> None:
    damaged = shard(own / file_format, "test")
    data = bytearray(damaged.read_bytes())
    middle = data.index(b"IHDR", 2000)  # inside of a PNG
    data[middle] ^= 1
    damaged.write_bytes({"cut off": data[:middle], "changed": data, "empty": b""}[damage])
    source = open_source("digits", str(own / file_format), "test")
    message = rf"^/.*{damaged.name}(, record \d+ cannot be read: | is damaged \(| ends before its record \d+;).*prepare"
    for batches in (EvalLoader(source, TRANSFORM, batch_size=48).batches(), train_loader(source).batches()):
        with pytest.raises(DataError, match=message) as found:
            list(zip(range(1000), batches, strict=False))
        assert len(str(found.value).splitlines()) == 1


def test_a_corrupt_file_of_a_small_set_is_named_when_it_is_read_into_memory(
    own: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = shard(own / "tfrecord", "test")
    whole = damaged.read_bytes()
    monkeypatch.setattr(tfds_source, "MEMORY_BYTES", 2**20)
    for rest, message in ((whole[:2000], "is damaged"), (b"", "ends before its record 90; repair it, or")):
        damaged.write_bytes(rest)
        source = open_source("digits", str(own / "tfrecord"), "test")
        with pytest.raises(DataError, match=rf"^/.*{damaged.name} {message}.*prepare the data set again"):
            train_loader(source).batches()


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_label_beyond_the_classes_is_named(file_format: str, own: pathlib.Path) -> None:
    source = open_source("digits", str(own / file_format), "test")
    source.info = source.info._replace(class_names=source.info.class_names[:9])
    message = r"^/.*digits-test.*, record \d+ has the label 9 outside of 9 classes; repair it, or prepare"
    for batches in (EvalLoader(source, TRANSFORM, batch_size=48).batches(), train_loader(source).batches()):
        with pytest.raises(DataError, match=message):
            list(zip(range(1000), batches, strict=False))


def test_a_negative_label_is_named(own: pathlib.Path) -> None:
    file = shard(own / "tfrecord", "test")
    examples = [
        tf.train.Example.FromString(record) for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
    ]
    examples[3].features.feature["label"].int64_list.value[:] = [-1]
    with tf.io.TFRecordWriter(str(file)) as writer:
        for example in examples:
            writer.write(example.SerializeToString())
    batches = train_loader(open_source("digits", str(own / "tfrecord"), "test")).batches()
    with pytest.raises(DataError, match=rf"{file.name}, record 3 has the label -1 outside of 10 classes; repair it"):
        list(itertools.islice(batches, 10))


def test_raise_open_file_limit_goes_as_far_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    infinite, raised = resource.RLIM_INFINITY, []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    for limits in ((1024, infinite), (1024, 4096), (1024, 1500), (infinite, infinite)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        tfds_source.raise_open_file_limit(1000)
    assert raised == [(2024, infinite), (2024, 4096), (1500, 1500)]


def test_an_unprepared_set_is_an_error_with_the_command_that_prepares_it(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"data.name='mnist' is not prepared.*tfds.builder\(\"mnist:.*data_dir=\"/"):
        open_source("mnist", str(tmp_path), "train")
    with pytest.raises(ValueError, match=r"data.name='imagenet2012' is not prepared.*imagenet.sh TARS_DIR /"):
        open_source("imagenet2012", str(tmp_path), "train")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patches/large", pytest.param("patches", marks=pytest.mark.slow)])
def test_the_printed_command_prepares_what_the_run_then_finds(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As printed, in a shell of another folder than the run's. Its Python knows the data sets of this file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is not prepared in") as refused:
        open_source(name, "~/my data", "train")
    command = str(refused.value).partition("prepare it with: ")[2]
    assert command.startswith("python -c ")
    (tmp_path / "sitecustomize.py").write_text(f"import runpy; runpy.run_path({str(BUILDERS)!r})\n")
    paths = f"{tmp_path}:{pathlib.Path(__file__).parents[2]}:{pathlib.Path(__file__).parents[3]}"
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": paths, "PATH": path}
    done = subprocess.run(command, shell=True, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert open_source(name, "~/my data", "train").info.num_examples == 1
    assert not (tmp_path / "~").exists()


def test_a_bucket_without_access_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("FailedPreconditionError: Failed to construct dataset") from tf.errors.PermissionDeniedError(
            None, None, "no access to gs://bucket"
        )

    monkeypatch.setattr(tfds, "builder", refuse)
    with pytest.raises(ValueError, match=r"data.data_dir=gs://bucket cannot be read \(.*no access.*\)"):
        open_source("digits", "gs://bucket", "train")


def test_a_half_prepared_set_is_an_error(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a preparation leaves it that was killed: files under the name of an unfinished folder, or no metadata."""
    monkeypatch.setattr(tfds_source, "EMBEDDED", ())
    tfds.builder("digits", data_dir=str(tmp_path)).download_and_prepare()
    done = tmp_path / "digits/1.0.0"
    os.rename(done, unfinished := tmp_path / "digits/incomplete.ABCDEF_1.0.0")
    with pytest.raises(ValueError, match=r"data.name='digits' is not prepared"):
        open_source("digits", str(tmp_path), "train")
    os.rename(unfinished, done)
    (done / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match=r"data.name='digits' is not prepared"):
        open_source("digits", str(tmp_path), "train")


def test_an_unknown_set_or_split_is_an_error(digits_dir: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"data.name='no_such_set' is not a data set"):
        open_source("no_such_set", str(digits_dir), "train")
    with pytest.raises(ValueError, match=r"split 'validation' of data.name='digits' is unknown; it has .*test"):
        open_source("digits", str(digits_dir), "validation")


def test_a_set_without_images_is_an_error(tmp_path: pathlib.Path) -> None:
    tfds.builder("sounds", data_dir=str(tmp_path)).download_and_prepare()
    with pytest.raises(ValueError, match=r"data.name='sounds' lacks the feature image and label; it has sound"):
        open_source("sounds", str(tmp_path), "train")


def test_another_file_format_is_an_error(digits_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(tfds_source.FORMATS, "tfrecord")
    with pytest.raises(ValueError, match=r"data.name='digits' is prepared as tfrecord, not as array_record"):
        open_source("digits", str(digits_dir), "train")
