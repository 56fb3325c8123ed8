import itertools
import types

import numpy as np
import pytest
import tensorflow as tf

from halvit_jax import bench
from halvit_jax.data import benchmark
from halvit_jax.data.pipeline import TrainLoader
from halvit_jax.data.transforms import train_transform


def test_photographs_are_jpegs_of_the_size_of_imagenets() -> None:
    photos = benchmark.photographs(3)
    assert [tuple(tf.io.extract_jpeg_shape(photo).numpy()) for photo in photos] == [(375, 500, 3)] * 3
    assert len(set(photos)) == 3


def test_in_memory_images_are_a_source_of_any_length() -> None:
    photos = benchmark.photographs(2)
    loader = TrainLoader(
        benchmark.InMemoryImages(photos, examples=10), train_transform((16, 16), **benchmark.CROP), batch_size=2, seed=0
    )
    assert loader.steps_per_epoch == 5
    batches = list(itertools.islice(loader.batches(), 6))
    assert all(batch["image"].shape == (2, 16, 16, 3) for batch in batches)


@pytest.mark.slow
def test_every_way_is_measured_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    rows = benchmark.measure_input(batch=2, rounds=1, batches=1, image_size=32)
    bare = ["bare tf.data", "bare tf.data, accurate DCT"]
    assert [row["what"] for row in rows] == [*bare, "crop", "crop, antialias", "DeiT", "loader, DeiT"]
    assert all(np.isfinite(row["images_per_s"]) and row["images_per_s_per_core"] > 0 for row in rows)
    bench.report_input(rows, types.SimpleNamespace(batch=2, repeats=1))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(rows)
    assert "1.00" in printed[2]
