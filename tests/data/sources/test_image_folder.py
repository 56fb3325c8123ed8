"""Folders of images: the digits as PNG files, from the first listing to a trained model."""

import hashlib
import itertools
import json
import pathlib
import runpy
import shutil
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from helpers.tiers import tiered
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_digits

from halvit_jax.cli import app
from halvit_jax.config import default_config
from halvit_jax.data.pipeline import Host, Loaders, make_loaders
from halvit_jax.data.sources import open_source, open_sources
from halvit_jax.main import work
from halvit_jax.protocols import DataError

CONFIG = pathlib.Path(__file__).parents[3] / "configs/halvit_folder.py"
NAMES = [f"digit {i}" for i in range(10)]
TRAIN, VAL = 24, 5  # images a class
BATCH = 16


def write_digits(root: pathlib.Path) -> None:
    digits = load_digits()
    for label, name in enumerate(NAMES):
        images = digits.images[digits.target == label][: TRAIN + VAL]
        for i, image in enumerate(images):
            path = root / ("train" if i < TRAIN else "val") / name / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """root/train/<class>/ and root/val/<class>/ with digits."""
    folder = tmp_path_factory.mktemp("images")
    write_digits(folder)
    return folder


@pytest.fixture
def own(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder to change: two classes, one image each in train and val."""
    for path in (tmp_path / split / name / "1.png" for split in ("train", "val") for name in ("cat", "dog")):
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
    return tmp_path


def _loaders(root: pathlib.Path, **changes: Any) -> Loaders:
    fields = default_config().data.to_dict() | {
        "name": "folder",
        "root": str(root),
        "eval_split": "val",
        "virtual_shards": 8,
    }
    fields |= {"crop": "whole", "shift": 1}
    return make_loaders(**fields | {"batch_size": BATCH, "image_size": 8, "seed": 0} | changes)


def _hash(batch: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()


@pytest.fixture(scope="module")
def reference(root: pathlib.Path) -> list[str]:
    """Hashes of the first two and a half epochs."""
    loader = _loaders(root).train
    return [_hash(batch) for batch in itertools.islice(loader.batches(), loader.steps_per_epoch * 5 // 2)]


def test_every_image_is_there_once_with_its_class(root: pathlib.Path) -> None:
    source = open_source("folder", "", "train", root=str(root))
    assert source.class_names == NAMES
    assert source.num_examples == 10 * TRAIN
    found = list(source.reader(1)(0).map(source.fetch).as_numpy_iterator())
    paths = [pathlib.Path(record["name"].decode()) for record in found]
    assert paths == sorted((root / "train").glob("*/*.png"))
    for path, record in zip(paths, found, strict=True):
        assert record["image"] == path.read_bytes()
        assert NAMES[record["label"]] == path.parent.name


def test_parts_are_consecutive_and_hold_every_image_once(root: pathlib.Path) -> None:
    source = open_source("folder", "", "val", root=str(root))
    for parts in (1, 7, 50):
        places = [[int(entry["position"]) for entry in source.reader(parts)(part)] for part in range(parts)]
        assert list(itertools.chain(*places)) == list(range(50))
        assert min(map(len, places)) == 50 // parts


def test_the_order_of_a_part_is_a_permutation_that_the_seed_draws(root: pathlib.Path) -> None:
    read = open_source("folder", "", "train", root=str(root)).reader(4)
    orders = [tuple(int(e["position"]) for e in read(1, tf.constant(seed, tf.int64))) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(60, 120))
    assert abs(np.corrcoef(orders[0], range(60))[0, 1]) < 0.5


def test_batches_are_a_function_of_seed_and_epoch(root: pathlib.Path, reference: list[str]) -> None:
    loader = _loaders(root).train
    assert loader.steps_per_epoch == 15
    assert [_hash(batch) for batch in itertools.islice(loader.batches(), len(reference))] == reference
    other = _loaders(root, seed=1).train
    assert not {_hash(batch) for batch in itertools.islice(other.batches(), 10)} & set(reference)
    assert len(set(reference)) == len(reference)


@pytest.mark.parametrize("start", tiered([1, 14, 15, 16, 33], {16}))
def test_batches_from_a_step_on_are_the_same_batches(root: pathlib.Path, reference: list[str], start: int) -> None:
    batches = itertools.islice(_loaders(root).train.batches(start), len(reference) - start)
    assert [_hash(batch) for batch in batches] == reference[start:]


@pytest.mark.parametrize("hosts", tiered([2, 8], {2}))
def test_any_number_of_hosts_sees_the_same_global_batches(root: pathlib.Path, reference: list[str], hosts: int) -> None:
    loaders = [_loaders(root, host=Host(i, hosts)).train.batches(12) for i in range(hosts)]
    for step in range(12, 18):
        parts = [next(loader) for loader in loaders]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert _hash(whole) == reference[step]


def test_resuming_reads_no_skipped_file(root: pathlib.Path, reference: list[str]) -> None:
    loader = _loaders(root, flip=False, shift=0).train
    source = loader._source
    read = []
    spied = {"fetch": lambda _, entry: _noted(source, entry, read)}
    loader._source = type("Spy", (), {"reader": source.reader, "num_examples": source.num_examples, **spied})()
    next(loader.batches(14))
    assert len(read) <= 3 * BATCH  # the batch and what is read ahead of it, of 240


def _noted(source: Any, entry: dict[str, tf.Tensor], read: list[int]) -> dict[str, tf.Tensor]:
    position = tf.numpy_function(lambda p: (read.append(int(p)), p)[1], [entry["position"]], tf.int64)
    return source.fetch({"position": tf.ensure_shape(position, [])})


@pytest.mark.parametrize("hosts", tiered([1, 3], {3}))
def test_evaluation_counts_every_image_once(root: pathlib.Path, hosts: int) -> None:
    loaders = [_loaders(root, batch_size=48, virtual_shards=48, host=Host(i, hosts)).eval for i in range(hosts)]
    labels = [batch["label"][batch["mask"]] for loader in loaders for batch in loader.batches()]
    assert np.bincount(np.concatenate(labels)).tolist() == [VAL] * 10


def test_all_kinds_of_images_are_read_and_other_files_passed_over(own: pathlib.Path) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for name in ("a.JPG", "b.jpeg", "c.JPEG", "d.bmp"):
        red.save(own / "val/cat" / name, "BMP" if name == "d.bmp" else "JPEG")
    red.save(own / "val/cat/e.gif", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    for name in (".hidden.png", "notes.txt", "f.webp"):
        (own / "val/cat" / name).write_bytes(b"no image")
    (own / "val/.hidden").mkdir()
    (own / "val/README.txt").write_text("read me")
    loaders = _loaders(own, batch_size=2, virtual_shards=2)
    (batch, *more) = loaders.eval.batches()
    images = np.concatenate([batch["image"], *(b["image"] for b in more)])
    masks = np.concatenate([batch["mask"], *(b["mask"] for b in more)])
    assert masks.sum() == loaders.eval.num_examples == 7
    assert loaders.class_names == ["cat", "dog"]
    assert (images[1:6, :, :, 0] >= 250).all()
    assert (images[1:6, :, :, 1:] <= 5).all()


def test_a_file_that_is_gone_is_named(own: pathlib.Path) -> None:
    loaders = _loaders(own, batch_size=2, virtual_shards=2)
    (own / "val/dog/1.png").unlink()
    with pytest.raises(DataError, match=r"val/dog/1\.png; No such file or directory; put it right"):
        list(loaders.eval.batches())


def test_a_root_that_is_not_there_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"data.name='folder' needs data.root"):
        _loaders("")
    with pytest.raises(ValueError, match=r"data.root='.*/nowhere' is no folder"):
        _loaders(tmp_path / "nowhere")


def test_a_split_that_is_not_there_is_refused(own: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ValueError, match=r"no folder 'validation'; data.train_split and data.eval_split .* train, val"):
        _loaders(own, eval_split="validation")
    with pytest.raises(ValueError, match=r"no folder 'train'; .* it has none"):
        _loaders(tmp_path_factory.mktemp("empty"))


def test_a_split_without_classes_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"/train of data.root has no sub-folders; each class needs one"):
        _loaders(tmp_path)


def test_classes_without_images_are_named_with_what_they_hold(own: pathlib.Path) -> None:
    for folder in ("ant", "bee"):
        (own / "train" / folder).mkdir()
    for name in ("1.webp", "2.webp", "notes"):
        (own / "train/bee" / name).write_bytes(b"")
    message = (
        r"/train of data.root has classes without images \(.jpg, .*\): ant \(empty\), bee \(2 .webp, 1 no suffix\)"
    )
    with pytest.raises(ValueError, match=message):
        _loaders(own)


def test_classes_of_only_one_split_are_named(own: pathlib.Path) -> None:
    for name in ("eel", *(f"x{i}" for i in range(6))):
        (own / "val" / name).mkdir()
        Image.new("RGB", (8, 8)).save(own / "val" / name / "1.png")
    with pytest.raises(ValueError, match=r"same classes; only one of them has eel, x0, x1, x2, x3 and 2 more"):
        open_sources("folder", "", str(own), "train", "folder", "val")


def _small(root: pathlib.Path, **changes: Any) -> ConfigDict:
    """The config of own images on two narrow blocks and images of 16 pixels."""
    config = runpy.run_path(str(CONFIG))["get_config"]("2")
    config.update_from_flattened_dict(
        {
            "data.root": str(root),
            "model.image_size": 16,
            "model.patch_size": 4,
            "model.width": 32,
            "model.depth": 1,
            "model.num_heads": 2,
            "optim.warmup_epochs": 0.0,
            "loop.log_every": 1,
        }
        | changes
    )
    return config


def test_the_config_for_own_images_needs_only_their_folder(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = work(_small(root), tmp_path / "run")
    assert result["step"] == 2  # two epochs of 240 images in batches of 128
    assert np.isfinite(result["eval"]["loss"])
    assert json.loads((tmp_path / "run/classes.json").read_text()) == NAMES
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["root"] == str(root)


@pytest.fixture
def spoilt(root: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The digits, and a page that is named as an image."""
    shutil.copytree(root, tmp_path / "images")
    (tmp_path / "images/train/digit 3/005.png").write_text("<html>")
    return tmp_path / "images"


EVERY_IMAGE = {"batch_size": 48, "data.virtual_shards": 16}  # in every epoch


@pytest.mark.slow  # half a minute to compile
def test_the_command_ends_with_a_line_that_names_a_file_that_is_no_image(
    spoilt: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        work(_small(spoilt, **EVERY_IMAGE), tmp_path / "run")
    assert ended.value.code == app.BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(
        f"error: {spoilt}/train/digit 3/005.png cannot be decoded (Invalid JPEG data, size 6); remove"
    )


@pytest.mark.slow
def test_the_command_finishes_where_images_are_replaced(
    spoilt: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = work(_small(spoilt, **EVERY_IMAGE, **{"data.on_bad_image": "replace"}), tmp_path / "run")
    assert result["step"] == 10
    assert np.isfinite([result["eval"]["loss"], result["ema_eval"]["loss"]]).all()
    messages = [record.getMessage() for record in caplog.records if record.name == "halvit_jax.data"]
    assert (
        messages[:2]
        == [f"replaced what cannot be decoded, number 1 of this epoch: ['{spoilt}/train/digit 3/005.png']"] * 2
    )


def test_another_number_of_classes_is_answered_with_the_field(
    root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        work(_small(root, **{"model.num_classes": 12}), tmp_path / "run")
    assert ended.value.code == app.BAD_INPUT
    assert "data.name='folder' has 10 classes; set model.num_classes=10" in capsys.readouterr().err
