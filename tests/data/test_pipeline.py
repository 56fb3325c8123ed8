import hashlib
import itertools
import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from helpers.tiers import tiered

from halvit_jax.config import default_config
from halvit_jax.data.pipeline import EvalLoader, Host, Loaders, TrainLoader, make_loaders
from halvit_jax.data.sources import open_source
from halvit_jax.data.sources.base import Entry, Record, Source, position_shard
from halvit_jax.data.transforms import Example, eval_transform
from halvit_jax.protocols import DatasetInfo

BATCH = 48
GOLDEN_TRAIN = ["e14cc280523235c2", "03961e866f396eaf", "e94e05f1bea18970"]
GOLDEN_EVAL = "b2c5bf73fdb56f56"


def _loaders(digits_dir: pathlib.Path, **changes: Any) -> Loaders:
    fields = default_config().data.to_dict() | {
        "name": "digits",
        "data_dir": str(digits_dir),
        "eval_split": "test",
        "crop": "whole",
        "flip": True,
        "shift": 1,
        "virtual_shards": 8,
    }
    keywords = fields | {"batch_size": BATCH, "size": (8, 8), "seed": 0} | changes
    return make_loaders(**keywords)


def _hashes(batches: Any, number: int) -> list[str]:
    return [_hash(batch) for batch in itertools.islice(batches, number)]


def _hash(batch: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()


@pytest.fixture(scope="module")
def reference(digits_dir: pathlib.Path) -> list[str]:
    """Hashes of the first two and a half epochs."""
    loader = _loaders(digits_dir).train
    return _hashes(loader.batches(), loader.steps_per_epoch * 5 // 2)


def test_batches_are_a_function_of_the_seed(digits_dir: pathlib.Path, reference: list[str]) -> None:
    assert _hashes(_loaders(digits_dir).train.batches(), len(reference)) == reference
    assert not set(_hashes(_loaders(digits_dir, seed=1).train.batches(), 10)) & set(reference)


def test_batches_are_those_of_the_golden_digests(digits_dir: pathlib.Path) -> None:
    """Nothing is rounded here, so the bytes are the same on any machine."""
    loaders = _loaders(digits_dir, eval_crop=1.0)
    train = _hashes(loaders.train.batches(28), 3)  # over the end of the first epoch
    assert [digest[:16] for digest in train] == GOLDEN_TRAIN
    assert hashlib.sha256("".join(_hashes(loaders.evals["eval"].batches(), 8)).encode()).hexdigest()[:16] == GOLDEN_EVAL


@pytest.mark.parametrize("start", tiered([1, 28, 29, 30, 45], {1, 29}))
def test_resume_at_a_step_gives_the_same_batches(digits_dir: pathlib.Path, reference: list[str], start: int) -> None:
    assert _hashes(_loaders(digits_dir).train.batches(start), len(reference) - start) == reference[start:]


@pytest.mark.parametrize("hosts", tiered([2, 4, 8], {4}))
def test_global_batches_are_elastic_over_hosts(digits_dir: pathlib.Path, reference: list[str], hosts: int) -> None:
    loaders = [_loaders(digits_dir, host=Host(i, hosts)).train.batches(20) for i in range(hosts)]
    for step in range(20, 40):
        parts = [next(loader) for loader in loaders]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert _hash(whole) == reference[step]


def test_shuffle_gives_each_epoch_another_order_and_an_example_at_most_once(digits_dir: pathlib.Path) -> None:
    loader = _loaders(digits_dir, flip=False, shift=0).train
    batches = list(itertools.islice(loader.batches(), 2 * loader.steps_per_epoch))
    images = [image.tobytes() for batch in batches for image in batch["image"]]
    epochs = images[: len(images) // 2], images[len(images) // 2 :]
    assert loader.steps_per_epoch == 1433 // 8 // (BATCH // 8)
    for epoch in epochs:
        assert len(epoch) - len(set(epoch)) <= 5  # the set itself holds a few equal images
    assert epochs[0] != epochs[1]


def test_training_may_have_other_images_than_evaluation(digits_dir: pathlib.Path) -> None:
    loaders = _loaders(digits_dir, train_size=6, eval_resize="squash")
    assert next(loaders.train.batches())["image"].shape == (BATCH, 6, 6, 3)
    assert next(loaders.evals["eval"].batches())["image"].shape == (BATCH, 8, 8, 3)
    with pytest.raises(ValueError, match=r"data\.train_size=-1 must not be negative"):
        _loaders(digits_dir, train_size=-1)


def test_repeated_aug_puts_copies_of_an_example_into_one_batch(digits_dir: pathlib.Path) -> None:
    loader = _loaders(digits_dir, flip=False, shift=0, repeated_aug=3).train
    assert loader.steps_per_epoch == _loaders(digits_dir).train.steps_per_epoch
    batch = next(loader.batches())
    assert len({image.tobytes() for image in batch["image"]}) <= BATCH // 3 + 8
    augmented = next(_loaders(digits_dir, repeated_aug=3).train.batches())
    assert len({image.tobytes() for image in augmented["image"]}) > BATCH // 2


@pytest.mark.parametrize(
    ("batch_size", "hosts"),
    [
        (48, 3),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)
            for sizes in ((50, 1), (48, 1), (364, 1), (1000, 4), (1000, 8), (2, 2))
        ),
    ],
)
def test_eval_counts_every_example_once(digits_dir: pathlib.Path, batch_size: int, hosts: int) -> None:
    source = open_source("digits", str(digits_dir), "test")
    transform = eval_transform((8, 8), fraction=1.0, method="bilinear")
    loaders = [EvalLoader(source, transform, batch_size=batch_size, host=Host(i, hosts)) for i in range(hosts)]
    batches = [list(loader.batches()) for loader in loaders]
    assert {len(own) for own in batches} == {loaders[0].steps_per_epoch}
    assert {batch["image"].shape for own in batches for batch in own} == {(batch_size // hosts, 8, 8, 3)}
    real = [row.tobytes() for own in batches for batch in own for row in batch["image"][batch["mask"]]]
    assert len(real) == 364
    records = source.shard(0, 1).map(source.fetch)
    assert sorted(real) == sorted(bytes(transform(record, None)["image"].numpy()) for record in records)


def test_a_host_without_eval_examples_gets_masked_batches(digits_dir: pathlib.Path) -> None:
    source = open_source("digits", str(digits_dir), "test[:3]")
    transform = eval_transform((8, 8), fraction=1.0, method="bilinear")
    masks = [
        [batch["mask"].tolist() for batch in EvalLoader(source, transform, batch_size=4, host=Host(i, 4)).batches()]
        for i in range(4)
    ]
    assert masks == [[[True]], [[True]], [[True]], [[False]]]


def test_several_evaluation_sets_count_each_example_once(digits_dir: pathlib.Path) -> None:
    loaders = _loaders(digits_dir, evals=("few=:test[:50]",))
    assert {name: loader.num_examples for name, loader in loaders.evals.items()} == {"eval": 364, "eval_few": 50}
    assert loaders.info == DatasetInfo([str(label) for label in range(10)], 1433, "digits")
    few = np.concatenate([batch["image"][batch["mask"]] for batch in loaders.evals["eval_few"].batches()])
    whole = np.concatenate([batch["image"] for batch in loaders.evals["eval"].batches()])
    np.testing.assert_array_equal(few, whole[:50])


class Dots(Source):
    """Images of 6x9 pixels, each with one white pixel, its box and a bitmap instead of a label."""

    info = DatasetInfo(["dot"], 20)

    def shard(self, index: tf.Tensor | int, count: int, seed: tf.Tensor | None = None) -> tf.data.Dataset:
        return position_shard(20, index, count, seed)

    def fetch(self, entry: Entry) -> Record:
        place = tf.cast(entry["position"], tf.int32)
        bitmap = tf.reshape(tf.one_hot(place, 54, 255, 0, dtype=tf.uint8), (6, 9))
        y, x = place // 9, place % 9
        box = tf.cast(tf.stack([[x, y, x + 1, y + 1]]), tf.float32)
        return {
            "image": tf.repeat(bitmap[..., None], 3, -1),
            "boxes": box,
            "bitmap": bitmap,
            "name": tf.constant("dot"),
        }


def mirrored(record: Record, seed: tf.Tensor) -> Example:
    """Mirror left and right with probability 1/2: the image, its box and its bitmap."""

    def mirror() -> tuple[tf.Tensor, ...]:
        left, top, right, bottom = tf.unstack(record["boxes"], axis=1)
        return record["image"][:, ::-1], tf.stack([9 - right, top, 9 - left, bottom], 1), record["bitmap"][:, ::-1]

    same = lambda: (record["image"], record["boxes"], record["bitmap"])  # noqa: E731
    image, boxes, bitmap = tf.cond(tf.random.stateless_uniform((), seed) < 0.5, mirror, same)
    return {"image": image, "boxes": boxes, "bitmap": bitmap, "name": record["name"], "decoded": tf.constant(True)}


def test_boxes_and_masks_travel_with_their_image() -> None:
    """A batch has the features of the transform's example and `mask`, nothing else."""
    train = TrainLoader(Dots(), mirrored, batch_size=4, seed=0)
    evaluation = EvalLoader(Dots(), mirrored, batch_size=6)
    batches = [*itertools.islice(train.batches(), 10), *evaluation.batches()]
    turned = set()
    for batch in batches:
        assert {name: array.shape[1:] for name, array in batch.items()} == {
            "image": (6, 9, 3),
            "boxes": (1, 4),
            "bitmap": (6, 9),
            "mask": (),
        }
        for image, boxes, bitmap in zip(
            *(batch[name][batch["mask"]] for name in ("image", "boxes", "bitmap")), strict=True
        ):
            ((y, x),) = np.argwhere(image[..., 0])
            np.testing.assert_array_equal(boxes, [[x, y, x + 1, y + 1]])
            np.testing.assert_array_equal(image[..., 0], bitmap)
            turned.add(int(y) * 9 + int(x) < 20)
    assert turned == {True, False}
    assert sum(batch["mask"].sum() for batch in batches[10:]) == 20


def test_invalid_values_are_errors_that_name_the_field(digits_dir: pathlib.Path) -> None:
    cases = {
        "data.repeated_aug=0 must be at least 1": {"repeated_aug": 0},
        "data.interpolation='cubic' is not one of bilinear, bicubic": {"interpolation": "cubic"},
        "batch_size=2048 in data.virtual_shards=8 needs more than the 1433 examples": {"batch_size": 2048},
        "3 hosts cannot share 8 virtual shards equally": {"host": Host(0, 3)},
        "data.augment='rand-x9' is not understood": {"augment": "rand-x9"},
        "data.on_bad_image='skip' is not one of error, replace": {"on_bad_image": "skip"},
        "data.bad_image_budget=-0.1 must lie between 0 and 1": {"bad_image_budget": -0.1},
        "data.bad_image_budget=1.1 must lie between 0 and 1": {"bad_image_budget": 1.1},
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            _loaders(digits_dir, **changes)
    with pytest.raises(ValueError, match="batch_size=5 must be a multiple of the 2 hosts"):
        EvalLoader(open_source("digits", str(digits_dir), "test"), lambda e, s: e, batch_size=5, host=Host(0, 2))
