"""Balanced sampling: how often classes are drawn, always the same, on any number of hosts."""

import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from halvit_jax.data.pipeline import Host, TrainLoader
from halvit_jax.data.sources import open_source, tfds
from halvit_jax.data.sources.balanced import BalancedSource
from halvit_jax.data.sources.image_folder import ImageFolder
from halvit_jax.data.transforms import eval_transform

COUNTS = {"ant": 90, "bee": 9, "cat": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    root = tmp_path_factory.mktemp("rare")
    for name, count in COUNTS.items():
        (root / "train" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(root / "train" / name / f"{number:02d}.png")
    return ImageFolder(str(root), "train")


def drawn(source: BalancedSource, epochs: int = 40) -> np.ndarray:
    """How often each class is drawn, of all draws."""
    labels = [
        int(source.fetch(entry)["label"])
        for seed in range(epochs)
        for entry in source.shard(0, 1, tf.constant(seed, tf.int64))
    ]
    assert len(labels) == epochs * sum(COUNTS.values())
    return np.bincount(labels, minlength=3) / len(labels)


@pytest.mark.parametrize(
    ("power", "shares"),
    [(1.0, [1 / 3] * 3), (0.0, [0.9, 0.09, 0.01]), (0.5, np.sqrt([90, 9, 1]) / np.sqrt([90, 9, 1]).sum())],
)
def test_classes_are_drawn_in_proportion_to_a_power_of_their_images(
    power: float, shares: list[float], folder: ImageFolder
) -> None:
    np.testing.assert_allclose(drawn(BalancedSource(folder, power), 10), shares, atol=0.04)  # 3 standard deviations


def test_batches_are_a_function_of_seed_and_step_on_any_number_of_hosts(folder: ImageFolder) -> None:
    transform = eval_transform((4, 4), fraction=1.0, method="bilinear")

    def batches(host: Host, start: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
        source = BalancedSource(folder, 1.0)
        loader = TrainLoader(source, transform, batch_size=16, seed=seed, virtual_shards=8, host=host)
        return list(itertools.islice(loader.batches(start), 8 - start))

    whole = batches(Host(), 0)
    parts = [batches(Host(index, 2), 3) for index in range(2)]
    for step, batch in enumerate(whole[3:]):
        for name in ("image", "label"):
            np.testing.assert_array_equal(batch[name], np.concatenate([part[step][name] for part in parts]))
    assert any((a["image"] != b["image"]).any() for a, b in zip(whole, batches(Host(), 0, seed=1), strict=True))


def test_without_a_seed_every_image_is_read_once(folder: ImageFolder) -> None:
    positions = [int(entry["position"]) for entry in BalancedSource(folder, 1.0).shard(0, 1)]
    assert positions == list(range(100))


def test_wrong_values_and_sources_are_refused(
    folder: ImageFolder, digits_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"data\.balance=1\.5 must lie between 0 and 1"):
        BalancedSource(folder, 1.5)
    monkeypatch.setattr(tfds, "MEMORY_BYTES", 0)
    with pytest.raises(ValueError, match=r"data\.balance=1\.0 needs random access: a folder, a data set prepared as"):
        BalancedSource(open_source("digits", str(digits_dir), "train"), 1.0)
