import pathlib

import pytest
import tensorflow as tf

from halvit_jax.data.sources import open_source


def test_parts_hold_every_record_once_and_in_order(digits_dir: pathlib.Path) -> None:
    source = open_source("digits", str(digits_dir), "test")
    whole = [bytes(record["image"]) for record in source.reader(0, 1)().as_numpy_iterator()]
    parts = [source.reader(part, 7)() for part in range(7)]
    sizes = [sum(1 for _ in part) for part in parts]
    assert [bytes(record["image"]) for part in parts for record in part.as_numpy_iterator()] == whole
    assert len(whole) == source.num_examples == sum(sizes)
    assert min(sizes) == source.part_size(7)


def test_records_stay_undecoded(digits_dir: pathlib.Path) -> None:
    record = next(iter(open_source("digits", str(digits_dir), "train").reader(0, 1)()))
    assert record["image"].dtype == tf.string
    assert record["image"].numpy().startswith(b"\x89PNG")


def test_a_large_set_is_read_from_its_files_in_an_order_of_the_seed(
    digits_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halvit_jax.data.sources.CACHE_BYTES", 0)
    reader = open_source("digits", str(digits_dir), "test").reader(1, 3)
    labels = [[int(r["label"]) for r in reader(tf.constant(seed, tf.int64))] for seed in (1, 1, 2)]
    assert labels[0] == labels[1]
    assert sorted(labels[0]) == sorted(labels[2]) == sorted(int(r["label"]) for r in reader())


def test_an_unprepared_set_is_refused_with_the_command_that_prepares_it(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"data.name='mnist' is not prepared.*tfds build mnist --data_dir="):
        open_source("mnist", str(tmp_path), "train")


def test_an_unknown_set_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"data.name='no_such_set' is no data set"):
        open_source("no_such_set", str(tmp_path), "train")


def test_an_unknown_split_is_refused_with_those_there_are(digits_dir: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"split 'validation' of data.name='digits' is unknown; it has .*test"):
        open_source("digits", str(digits_dir), "validation")
