"""Images per second that this machine prepares: bare tf.data, each transform, and the loader around them."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_sample_images

from halvit_jax.data import ops
from halvit_jax.data.pipeline import TrainLoader
from halvit_jax.data.sources.base import Entry, Record, Source, position_shard
from halvit_jax.data.transforms import Transform, train_transform
from halvit_jax.protocols import DatasetInfo

CROP = {"crop": "random_resized", "min_area": 0.08, "flip": True, "shift": 0, "color_jitter": 0.0}
CROP |= {"policy": "", "method": "bicubic", "antialias": False}
DEIT = CROP | {"antialias": True, "policy": "rand-m9-mstd0.5-inc1"}


def measure_input(*, batch: int, rounds: int, batches: int = 6, image_size: int = 224) -> list[dict[str, Any]]:
    """One row for each way of preparing the same JPEGs of 500x375 pixels; the ways take turns within every round.

    `images_per_s` counts wall-clock time, `images_per_s_per_core` processor time, which other work on a shared machine
    disturbs less; both are medians over the rounds.
    """
    encoded, size = photographs(64), (image_size, image_size)
    images = InMemoryImages(encoded, examples=100 * batch)  # an epoch outlasts the measurement, as it does in training
    deit = train_transform(size, **DEIT)
    ways: dict[str, Callable[[], Iterator[Any]]] = {
        "bare tf.data": lambda: _bare(encoded, batch, size, "INTEGER_FAST"),  # TensorFlow's default
        "bare tf.data, accurate DCT": lambda: _bare(encoded, batch, size, ops.DCT),  # ours: the pixels of Pillow
        "crop": lambda: _mapped(encoded, batch, train_transform(size, **CROP)),
        "crop, antialias": lambda: _mapped(encoded, batch, train_transform(size, **CROP | {"antialias": True})),
        "DeiT": lambda: _mapped(encoded, batch, deit),
        "loader, DeiT": lambda: TrainLoader(images, deit, batch_size=batch, seed=0).batches(),
    }
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            source = way()  # a new source each time, so it prefetches nothing while others are measured
            next(source)
            clock, processor = time.perf_counter(), time.process_time()
            for _ in range(batches):
                next(source)
            used = time.perf_counter() - clock, time.process_time() - processor
            speeds[name].append((batches * batch / used[0], batches * batch / used[1]))
            del source
    return [
        {
            "what": name,
            "images_per_s": round(statistics.median(speed for speed, _ in found), 1),
            "images_per_s_per_core": round(statistics.median(speed for _, speed in found), 1),
        }
        for name, found in speeds.items()
    ]


def photographs(count: int) -> list[bytes]:
    """JPEGs of 500x375 pixels and quality 95, cut out of scikit-learn's two photographs."""
    photos = load_sample_images().images  # uint8 [427, 640, 3]
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        photo = photos[number % len(photos)]
        top, left = rng.integers(0, photo.shape[0] - 375), rng.integers(0, photo.shape[1] - 500)
        found.append(tf.io.encode_jpeg(photo[top : top + 375, left : left + 500], quality=95).numpy())
    return found


class InMemoryImages(Source):
    """Encoded images in memory, repeated up to `examples`, as a source of one class."""

    def __init__(self, encoded: list[bytes], *, examples: int) -> None:
        self.info = DatasetInfo(["photograph"], examples)
        self._encoded = tf.constant(encoded)

    def shard(self, index: tf.Tensor | int, count: int, seed: tf.Tensor | None = None) -> tf.data.Dataset:
        """The positions of a shard."""
        return position_shard(self.info.num_examples, index, count, seed)

    def fetch(self, entry: Entry) -> Record:
        """The image at the entry's position."""
        image = tf.gather(self._encoded, entry["position"] % len(self._encoded))
        return {"image": image, "label": tf.constant(0), "name": tf.constant("a photograph")}


def _mapped(encoded: list[bytes], batch: int, transform: Transform) -> Iterator[Any]:
    def prepare(number: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
        return transform({"image": image}, tf.stack([number, 0]))["image"]

    return _batches(encoded, batch, prepare)


def _bare(encoded: list[bytes], batch: int, size: tuple[int, int], dct: str) -> Iterator[Any]:
    """Decoding, cropping and resizing the same boxes by TensorFlow alone."""

    def prepare(number: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
        shape = tf.image.extract_jpeg_shape(image)
        seed = ops.fold_in(tf.stack([number, 0]), 0)
        box = ops.random_box(shape[0], shape[1], seed, CROP["min_area"])
        crop = tf.io.decode_and_crop_jpeg(image, box, channels=3, dct_method=dct)
        crop = tf.image.stateless_random_flip_left_right(crop, tf.stack([number, 1]))
        resized = tf.image.resize(crop, size, method="bicubic")
        return tf.cast(tf.clip_by_value(resized, 0, 255), tf.uint8)

    return _batches(encoded, batch, prepare)


def _batches(encoded: list[bytes], batch: int, prepare: Callable[..., tf.Tensor]) -> Iterator[Any]:
    images = tf.data.Dataset.from_tensor_slices(encoded).repeat().enumerate()
    prepared = images.map(ops.no_autograph(prepare), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return prepared.batch(batch, drop_remainder=True).as_numpy_iterator()
