import pathlib
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from halvit_jax.data.sources import open_source


def _examples(digits_dir: pathlib.Path, split: str) -> list[tuple[bytes, int]]:
    open_source("digits", str(digits_dir), split)
    builder = tfds.builder("digits", data_dir=str(digits_dir))
    return [
        (example["image"].tobytes(), int(example["label"]))
        for example in tfds.as_numpy(builder.as_dataset(split=split))
    ]


def test_the_digits_splits_hold_every_digit_of_scikit_learn_once(digits_dir: pathlib.Path) -> None:
    found = Counter(_examples(digits_dir, "train") + _examples(digits_dir, "test"))
    raw = load_digits()
    pixels = np.round(raw.images * (255 / 16)).astype(np.uint8)
    expected = Counter((image.tobytes(), int(label)) for image, label in zip(pixels, raw.target, strict=True))
    assert found == expected
    assert sum(found.values()) == 1797


def test_the_test_split_is_a_fifth_of_every_class(digits_dir: pathlib.Path) -> None:
    train = Counter(label for _, label in _examples(digits_dir, "train"))
    test = Counter(label for _, label in _examples(digits_dir, "test"))
    for label in range(10):
        assert abs(test[label] - (train[label] + test[label]) / 5) < 1


def test_making_the_digits_prints_nothing(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert open_source("digits", str(tmp_path), "test").info.num_examples == 364
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
