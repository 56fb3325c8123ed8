"""Batches of detection: the same for a seed, on any number of hosts and after any restart, over two canvases."""

import hashlib
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from helpers import small_coco
from helpers.tiers import tiered

from halvit_jax.config import default_config
from halvit_jax.data import instance_loaders
from halvit_jax.data.instance_loaders import make_detection_loaders
from halvit_jax.data.pipeline import Host, Loaders
from halvit_jax.protocols import DataError

CANVASES = ((40, 64), (64, 50))
BATCH = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A set of 35 training and 10 evaluation images."""
    folder = tmp_path_factory.mktemp("coco")
    small_coco.write(folder, small_coco.content(35), small_coco.content(10))
    return folder


def _fields(folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
    files = {"train_annotations": "train.json", "eval_annotations": "eval.json"}
    files |= {"train_images": "train", "eval_images": "eval", "root": str(folder)}
    given = {"canvases": CANVASES, "short_side": 0, "max_objects": 3, "batch_size": BATCH, "seed": 0}
    return default_config().instances.to_dict() | files | given | changes


def _loaders(folder: pathlib.Path, **changes: Any) -> Loaders:
    return make_detection_loaders(**_fields(folder, **changes))


def _hash(batch: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()


def _hashes(batches: Any, number: int) -> list[str]:
    return [_hash(batch) for batch in itertools.islice(batches, number)]


@pytest.fixture(scope="module")
def reference(root: pathlib.Path) -> list[str]:
    """Hashes of two and a half epochs."""
    train = _loaders(root).train
    return _hashes(train.batches(), train.steps_per_epoch * 5 // 2)


def test_batches_are_a_function_of_the_seed(root: pathlib.Path, reference: list[str]) -> None:
    assert _hashes(_loaders(root).train.batches(), len(reference)) == reference
    assert not set(_hashes(_loaders(root, seed=1).train.batches(), 10)) & set(reference)
    assert len(set(reference)) == len(reference)


@pytest.mark.parametrize("start", tiered([1, 3, 4, 5, 6, 9], {3, 9}))
def test_resume_at_a_step_gives_the_same_batches_over_both_canvases(
    root: pathlib.Path, reference: list[str], start: int
) -> None:
    loader = _loaders(root).train
    assert loader.steps_per_epoch == 5
    shapes = {batch["image"].shape[1:3] for batch in itertools.islice(loader.batches(start), 5)}
    assert shapes == set(CANVASES)
    assert _hashes(loader.batches(start), len(reference) - start) == reference[start:]


@pytest.mark.parametrize("hosts", [2, 4])
def test_global_batches_are_elastic_over_hosts(root: pathlib.Path, reference: list[str], hosts: int) -> None:
    loaders = [_loaders(root, host=Host(n, hosts)).train.batches(2) for n in range(hosts)]
    for step in range(2, 9):
        parts = [next(loader) for loader in loaders]
        assert _hash({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}) == reference[step]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_eval_counts_every_image_once_on_any_number_of_hosts(root: pathlib.Path, hosts: int) -> None:
    loaders = [_loaders(root, host=Host(n, hosts)).evals["eval"] for n in range(hosts)]
    batches = [list(loader.batches()) for loader in loaders]
    assert {len(own) for own in batches} == {loaders[0].steps_per_epoch}
    ids = [number for own in batches for batch in own for number in batch["image_id"][batch["mask"]]]
    assert sorted(ids) == list(range(100, 110))
    assert loaders[0].num_examples == 10
    together = list(_loaders(root).evals["eval"].batches())
    for step, whole in enumerate(together):
        joined = {name: np.concatenate([own[step][name] for own in batches]) for name in whole}
        assert _hash(joined) == _hash(whole)


def test_eval_starts_at_a_batch(root: pathlib.Path) -> None:
    loader = _loaders(root).evals["eval"]
    assert _hashes(loader.batches(2), 9) == _hashes(loader.batches(), 9)[2:]


def test_images_without_objects_are_trained_on_if_they_are_kept(root: pathlib.Path) -> None:
    plain, kept = _loaders(root).train, _loaders(root, keep_empty=True).train
    assert (plain.num_examples, kept.num_examples) == (24, 35)
    counts = [batch["real"].sum(1) for batch in itertools.islice(kept.batches(), kept.steps_per_epoch)]
    assert np.concatenate(counts).min() == 0
    assert min(batch["real"].sum(1).min() for batch in itertools.islice(plain.batches(), 5)) >= 1


def test_flips_and_sizes_are_drawn_for_every_image(root: pathlib.Path) -> None:
    sides = {"short_side": 40, "long_side": 64, "train_short_sides": (20, 30)}
    loader = _loaders(root, **sides).train
    sizes = np.concatenate([batch["size"] for batch in itertools.islice(loader.batches(), 5)])
    assert set(sizes.min(1)) == {20, 30}
    fixed = [batch["image"] for batch in itertools.islice(_loaders(root, flip=False).train.batches(), 5)]
    mirrored = [batch["image"] for batch in itertools.islice(_loaders(root).train.batches(), 5)]
    changed = [(a != b).any() for x, y in zip(fixed, mirrored, strict=True) for a, b in zip(x, y, strict=True)]
    assert 4 < sum(changed) < 16


def test_info_has_the_classes_and_what_evaluation_needs(root: pathlib.Path) -> None:
    info = _loaders(root).info
    assert info.class_names == ["dog", "cat", "bird"]
    assert info.num_examples == 24
    assert json.loads(json.dumps(info.extra)) == {
        "category_ids": [3, 7, 90],
        "eval_annotations": str(root / "eval.json"),
    }


def test_without_training_no_training_data_are_needed(root: pathlib.Path) -> None:
    loaders = _loaders(root, training=False, train_annotations="none.json", train_images="none")
    assert loaders.train is None
    assert loaders.info.num_examples == loaders.evals["eval"].num_examples == 10
    assert loaders.info.extra == _loaders(root).info.extra


def test_loaders_describe_what_they_use_and_leave_out(root: pathlib.Path) -> None:
    loaders = _loaders(root, batch_size=12)
    text = "\n".join(loaders.train.describe())
    assert "35 images, 24 of them used" in text
    assert "images not trained on: 11 without ground truth, 11 in a canvas with fewer images than a batch" in text
    assert "10 images, 10 of them used" in "\n".join(loaders.evals["eval"].describe())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "voc"}, "instances.name='voc' is not one of coco, digits_scenes"),
        (
            {"name": "coco/2017"},
            "instances.name='coco/2017': the coco/2017 of TFDS has no segmentation, no category ids",
        ),
        (
            {"root": "s3://bucket/coco"},
            "instances.root=s3://bucket/coco must be a local path or",
        ),
        ({"data_dir": "s3://bucket"}, "instances.data_dir=s3://bucket must be a local path or"),
        ({"root": ""}, "instances.name='coco' needs instances.root"),
        ({"short_side": -1}, "instances.short_side=-1 must not be negative"),
        ({"long_side": -2}, "instances.long_side=-2 must not be negative"),
        ({"max_objects": 0}, "instances.max_objects=0 must be at least 1"),
        (
            {"max_objects": 1},
            r"max_objects=1 is less than the 2 objects on image 102 .*11 images have more; raise it to 2",
        ),
        ({"batch_size": 5, "host": Host(0, 2)}, "batch_size=5 must be a multiple of the 2 hosts"),
        ({"batch_size": 25}, "batch_size=25 is more than the images of any canvas"),
        ({"canvases": ((40, 64),)}, r"instances.canvases=\(\(40, 64\),\) hold no image of 50 x 50, 60 x 40"),
        ({"train_annotations": "none.json"}, "instances.train_annotations='.*none.json': no such file"),
        ({"eval_annotations": "none.json"}, "instances.eval_annotations='.*none.json': no such file"),
        ({"eval_images": "empty"}, r"instances.eval_images: .*empty lacks 10 of the 10 images .*: 0.png, 1.png"),
    ],
)
def test_a_wrong_field_is_named_before_any_batch(root: pathlib.Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _loaders(root, **changes)


def test_an_epoch_of_nothing_is_an_error_with_the_reasons(tmp_path: pathlib.Path) -> None:
    content = small_coco.content(3)
    for annotation in content["annotations"]:
        annotation["area"] = 0
    small_coco.write(tmp_path, content)
    with pytest.raises(ValueError, match=r"has no image to train on; .* 3 without ground truth, 1 crowd, 4 of no area"):
        _loaders(tmp_path)


def test_both_files_must_have_the_same_categories(tmp_path: pathlib.Path) -> None:
    other = small_coco.content()
    other["categories"][0]["name"] = "cow"
    small_coco.write(tmp_path, small_coco.content(), other)
    with pytest.raises(ValueError, match="must have the same categories; only one of them has 7 cat, 7 cow"):
        _loaders(tmp_path)


def test_a_bad_image_ends_the_batches_with_its_name(tmp_path: pathlib.Path) -> None:
    small_coco.write(tmp_path, small_coco.content())
    loader = _loaders(tmp_path, batch_size=1).evals["eval"]
    (tmp_path / "eval" / "4.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"4\.png cannot be decoded"):
        list(loader.batches())


def test_an_iterator_that_is_dropped_leaves_no_threads(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(instance_loaders, "THREADS", 3)
    batches = _loaders(root).train.batches()
    next(batches)
    assert any(thread.name.startswith("instances") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("instances") for thread in threading.enumerate())
