"""The error tracker by itself, on made-up batches and sources; with real files in test_bad_images."""

import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from halvit_jax.data.errors import ErrorTracker
from halvit_jax.data.sources import open_source
from halvit_jax.data.sources import tfds as tfds_source
from halvit_jax.data.sources.base import Entry, Record, Source
from halvit_jax.protocols import DataError, DatasetInfo
from halvit_jax.text import first_few

STEPS = 3  # of an epoch
Batches = Iterator[dict[str, np.ndarray]]


class Files(Source):
    """A source of a thousand files named 0, 1, 2 ..."""

    info = DatasetInfo(["cat", "dog"], 1000)

    def fetch(self, entry: Entry) -> Record:
        return {"name": tf.strings.as_string(entry["position"])}


def rows(step: int) -> Iterator[tuple[Entry]]:
    """The two rows of a step."""
    for position in (2 * step, 2 * step + 1):
        yield ({"position": tf.constant(position)},)


def batch(names: str, bad: str = "") -> dict[str, np.ndarray]:
    """A batch of files with names of one letter."""
    return {
        "name": np.array([name.encode() for name in names], object),
        "decoded": np.array([name not in bad for name in names]),
        "label": np.array([ord(name) for name in names]),
    }


def tracker(budget: float = 0.0, **changes: Any) -> ErrorTracker:
    given = {"source": Files(), "prepare": lambda entry: entry, "replay": rows, "steps_per_epoch": STEPS}
    return ErrorTracker(**given | changes, budget=budget)


def failing(error: Exception, after: int = 0) -> Batches:
    """Batches that end with an error."""
    for _ in range(after):
        yield batch("ab")
    raise error


def refuse(*positions: int) -> Callable[[Entry], None]:
    """A preparation that fails on some of the files."""

    def prepare(entry: Entry) -> None:
        if entry["position"] in positions:
            raise tf.errors.InvalidArgumentError(None, None, "Invalid JPEG data, size 6 [Op:DecodeImage] name: ")

    return prepare


INVALID = tf.errors.InvalidArgumentError(None, None, "{{function_node a}} Invalid PNG data [[{{node b}}]]\nmore")


def test_batches_are_passed_on_without_the_tracked_features(caplog: pytest.LogCaptureFixture) -> None:
    given = [batch("ab"), batch("cd")]
    found = list(tracker().batches(iter(given), 0))
    assert [sorted(one) for one in found] == [["label"]] * 2
    assert [one["label"].tolist() for one in found] == [[97, 98], [99, 100]]
    assert not caplog.records


def test_a_replaced_image_is_logged_as_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    list(tracker(0.01).batches(iter([batch("abc", "ca"), batch("de"), batch("fg", "f")]), 0))
    assert [(record.name, record.levelno) for record in caplog.records] == [("halvit_jax.data", logging.WARNING)] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "replaced images that cannot be decoded, 2 so far: a, c",
        "replaced images that cannot be decoded, 3 so far: f",
    ]


def test_an_image_that_is_replaced_in_every_epoch_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    epochs = [batch("ab", "a") if step % 1000 == 0 else batch("cd") for step in range(2000)]
    list(tracker(0.01).batches(iter(epochs), 0))
    assert [record.getMessage() for record in caplog.records] == ["replaced images that cannot be decoded, 1 so far: a"]


def test_the_bad_image_budget_always_allows_one() -> None:
    batches = tracker(0.0).batches(iter([batch("ab", "a"), batch("cd"), batch("ef", "f")]), 0)
    assert len(list(itertools.islice(batches, 2))) == 2
    message = r"^2 images of this epoch cannot be decoded, but only 1 may be: a, f; remove them, or raise .*budget$"
    with pytest.raises(DataError, match=message):
        next(batches)


@pytest.mark.parametrize(("budget", "allowed"), [(0.001, 1), (0.003, 3), (0.0039, 3), (0.006, 6)])
def test_the_bad_image_budget_is_a_fraction_of_the_examples(budget: float, allowed: int) -> None:
    letters = "abcdefghi"
    batches = tracker(budget, steps_per_epoch=100).batches(iter([batch(letter, letter) for letter in letters]), 0)
    assert len(list(itertools.islice(batches, allowed))) == allowed
    names = first_few(list(letters[: allowed + 1]))
    with pytest.raises(DataError, match=f"^{allowed + 1} images .* only {allowed} may be: {names}; remove them"):
        next(batches)


def test_a_repeated_bad_image_counts_once() -> None:
    given = [batch("aaa", "a"), batch("aba", "a"), batch("bca", "a")]
    assert len(list(tracker().batches(iter(given), 0))) == 3


@pytest.mark.parametrize("first_step", [0, 1, 7])
def test_the_bad_image_budget_restarts_with_every_epoch(first_step: int) -> None:
    left = STEPS - first_step % STEPS  # steps of the first epoch
    bad = "a" * left + "b" * STEPS + "c" * STEPS
    assert len(list(tracker().batches((batch("abc", letter) for letter in bad), first_step))) == len(bad)
    with pytest.raises(DataError, match=r"2 images .*: b, c"):
        list(tracker().batches((batch("abc", letter) for letter in "a" * left + "bc"), first_step))


@pytest.mark.parametrize("first_step", [0, 5])
def test_a_decode_error_names_the_file(first_step: int) -> None:
    guilty = 2 * (first_step + 2) + 1
    tracked = tracker(prepare=refuse(guilty)).batches(failing(INVALID, after=2), first_step)
    message = rf"^{guilty} cannot be decoded \(Invalid JPEG data, size 6\); remove it, or set .*='replace'$"
    with pytest.raises(DataError, match=message) as found:
        list(tracked)
    assert found.value.__cause__ is INVALID


def test_no_file_is_named_where_all_decode_on_replay() -> None:
    with pytest.raises(DataError, match=r"^Invalid PNG data$"):
        list(tracker(prepare=refuse(99)).batches(failing(INVALID), 0))


@pytest.mark.parametrize("kind", ["of TensorFlow", "of Python"])
@pytest.mark.parametrize("place", ["fetch", "replay"])
def test_an_error_in_reading_a_record_names_it(place: str, kind: str) -> None:
    error = tf.errors.NotFoundError(None, None, "file 7 is not there [Op:ReadFile]")
    error = error if kind == "of TensorFlow" else ValueError("file 7 is not there\nTraceback")

    class Broken(Files):
        def fetch(self, entry: Entry) -> Record:
            raise error

    def replay(step: int) -> Iterator[tuple]:
        raise error
        yield

    changes = {"fetch": {"source": Broken()}, "replay": {"replay": replay}}[place]
    with pytest.raises(DataError, match=r"^file 7 is not there; repair it, or prepare the data set again$"):
        list(tracker(**changes).batches(failing(INVALID), 0))


def test_a_corrupt_tfrecord_that_can_be_read_again_is_not_named(
    digits_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tfds_source, "MEMORY_BYTES", 0)
    error = tf.errors.DataLossError(None, None, "corrupted record at 12 [Op:IteratorGetNext]")
    source = open_source("digits", str(digits_dir), "train")
    message = r"^a file of /.*digits.* is damaged \(corrupted record at 12\); prepare the data set again$"
    with pytest.raises(DataError, match=message):
        list(tracker(source=source).batches(failing(error), 0))


def test_a_data_loss_the_source_cannot_diagnose_is_searched_among_the_rows() -> None:
    error = tf.errors.DataLossError(None, None, "checksum does not match")
    with pytest.raises(DataError, match=r"^1 cannot be decoded"):
        list(tracker(prepare=refuse(1)).batches(failing(error), 0))


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        list(tracker().batches(failing(ZeroDivisionError()), 0))
