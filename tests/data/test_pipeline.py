import hashlib
import itertools
import pathlib
from typing import Any

import numpy as np
import pytest
from helpers.tiers import tiered

from halvit_jax.config import default_config
from halvit_jax.data.pipeline import EvalLoader, Host, Loaders, make_loaders
from halvit_jax.data.sources import open_source
from halvit_jax.data.transforms import eval_transform

BATCH = 48


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
    keywords = fields | {"batch_size": BATCH, "image_size": 8, "seed": 0} | changes
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


def test_equal_seeds_give_equal_batches_and_others_do_not(digits_dir: pathlib.Path, reference: list[str]) -> None:
    assert _hashes(_loaders(digits_dir).train.batches(), len(reference)) == reference
    assert not set(_hashes(_loaders(digits_dir, seed=1).train.batches(), 10)) & set(reference)


@pytest.mark.parametrize("start", tiered([1, 28, 29, 30, 45], {1, 29}))
def test_batches_from_a_step_on_are_the_same_batches(
    digits_dir: pathlib.Path, reference: list[str], start: int
) -> None:
    assert _hashes(_loaders(digits_dir).train.batches(start), len(reference) - start) == reference[start:]


@pytest.mark.parametrize("hosts", tiered([2, 4, 8], {4}))
def test_any_number_of_hosts_sees_the_same_global_batches(
    digits_dir: pathlib.Path, reference: list[str], hosts: int
) -> None:
    loaders = [_loaders(digits_dir, host=Host(i, hosts)).train.batches(20) for i in range(hosts)]
    for step in range(20, 40):
        parts = [next(loader) for loader in loaders]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert _hash(whole) == reference[step]


def test_an_epoch_holds_an_example_at_most_once_and_the_next_is_in_another_order(digits_dir: pathlib.Path) -> None:
    loader = _loaders(digits_dir, flip=False, shift=0).train
    batches = list(itertools.islice(loader.batches(), 2 * loader.steps_per_epoch))
    images = [image.tobytes() for batch in batches for image in batch["image"]]
    epochs = images[: len(images) // 2], images[len(images) // 2 :]
    assert loader.steps_per_epoch == 1433 // 8 // (BATCH // 8)
    for epoch in epochs:
        assert len(epoch) - len(set(epoch)) <= 5  # the set itself holds a few equal images
    assert epochs[0] != epochs[1]


def test_repeats_put_copies_of_an_example_into_one_batch(digits_dir: pathlib.Path) -> None:
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
def test_evaluation_counts_every_example_once(digits_dir: pathlib.Path, batch_size: int, hosts: int) -> None:
    source = open_source("digits", str(digits_dir), "test")
    transform = eval_transform(8, share=1.0, method="bilinear")
    loaders = [EvalLoader(source, transform, batch_size=batch_size, host=Host(i, hosts)) for i in range(hosts)]
    batches = [list(loader.batches()) for loader in loaders]
    assert {len(own) for own in batches} == {loaders[0].steps_per_epoch}
    assert {batch["image"].shape for own in batches for batch in own} == {(batch_size // hosts, 8, 8, 3)}
    real = [row.tobytes() for own in batches for batch in own for row in batch["image"][batch["mask"]]]
    assert len(real) == 364
    records = source.reader(1)(0).map(source.fetch)
    assert sorted(real) == sorted(bytes(transform(record["image"], None)["image"].numpy()) for record in records)


def test_a_host_without_examples_still_gets_as_many_batches(digits_dir: pathlib.Path) -> None:
    source = open_source("digits", str(digits_dir), "test[:3]")
    transform = eval_transform(8, share=1.0, method="bilinear")
    masks = [
        [batch["mask"].tolist() for batch in EvalLoader(source, transform, batch_size=4, host=Host(i, 4)).batches()]
        for i in range(4)
    ]
    assert masks == [[[True]], [[True]], [[True]], [[False]]]


def test_wrong_values_are_refused(digits_dir: pathlib.Path) -> None:
    cases = {
        "data.repeated_aug=0 must be at least 1": {"repeated_aug": 0},
        "data.interpolation='cubic' is not one of bilinear, bicubic": {"interpolation": "cubic"},
        "batch_size=2048 over 8 readers asks for more than the 1433 examples": {"batch_size": 2048},
        "3 hosts cannot share 8 readers equally": {"host": Host(0, 3)},
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
