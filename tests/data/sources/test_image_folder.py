"""Image folders: the digits as PNG files, from listing the folders to a trained model."""

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
from halvit_jax.data.pipeline import EvalLoader, Host, Loaders, TrainLoader, make_loaders
from halvit_jax.data.sources import image_folder, open_source
from halvit_jax.data.sources.base import Entry, Record
from halvit_jax.data.sources.image_folder import ImageFolder
from halvit_jax.data.transforms import eval_transform
from halvit_jax.main import run_experiment
from halvit_jax.protocols import DataError, DatasetInfo

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
    return make_loaders(**fields | {"batch_size": BATCH, "size": (8, 8), "seed": 0} | changes)


def _hash(batch: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()


@pytest.fixture(scope="module")
def reference(root: pathlib.Path) -> list[str]:
    """Hashes of the first two and a half epochs."""
    loader = _loaders(root).train
    return [_hash(batch) for batch in itertools.islice(loader.batches(), loader.steps_per_epoch * 5 // 2)]


def test_every_image_is_read_once_with_its_label(root: pathlib.Path) -> None:
    source = open_source("folder", "", "train", root=str(root))
    assert source.info == DatasetInfo(NAMES, 10 * TRAIN, "folder")
    found = list(source.shard(0, 1).map(source.fetch).as_numpy_iterator())
    paths = [pathlib.Path(record["name"].decode()) for record in found]
    assert paths == sorted((root / "train").glob("*/*.png"))
    for path, record in zip(paths, found, strict=True):
        assert record["image"] == path.read_bytes()
        assert NAMES[record["label"]] == path.parent.name


def test_batches_are_a_function_of_seed_and_epoch(root: pathlib.Path, reference: list[str]) -> None:
    loader = _loaders(root).train
    assert loader.steps_per_epoch == 15
    assert [_hash(batch) for batch in itertools.islice(loader.batches(), len(reference))] == reference
    other = _loaders(root, seed=1).train
    assert not {_hash(batch) for batch in itertools.islice(other.batches(), 10)} & set(reference)
    assert len(set(reference)) == len(reference)


def _empty_files(root: pathlib.Path, classes: int, images: int) -> ImageFolder:
    """A training split of which nothing is read but names."""
    for label in range(classes):
        folder = root / f"train/{label:04d}"
        folder.mkdir(parents=True)
        for i in range(images):
            (folder / f"{i:03d}.png").touch()
    return ImageFolder(str(root), "train")


def _labels(source: ImageFolder, entries: tf.data.Dataset) -> np.ndarray:
    labels = tf.gather(source._labels, tf.stack([entry["position"] for entry in entries]))
    return labels.numpy()


def test_every_pair_of_classes_is_mixed_within_an_epoch(tmp_path: pathlib.Path) -> None:
    """The partner of a row is that of the reversed batch."""
    source = _empty_files(tmp_path, 10, 100)
    transform = eval_transform((8, 8), fraction=1.0, method="bilinear")
    loader = TrainLoader(source, transform, batch_size=40, seed=0, virtual_shards=8)
    entries = loader._entries(0).take(loader.steps_per_epoch * 40).map(lambda epoch, n, entry: entry)
    rows = _labels(source, entries).reshape(-1, 40)
    pairs = np.zeros((10, 10), int)
    np.add.at(pairs, (rows, rows[:, ::-1]), 1)
    assert pairs.sum() == 1000
    assert pairs.min() >= 1
    assert np.bincount(rows.ravel()).tolist() == [100] * 10


@pytest.mark.slow
def test_no_class_of_a_thousand_has_few_partners(tmp_path: pathlib.Path) -> None:
    """What shares no batch row's shard and mirror with a class is never mixed with it, in any epoch."""
    source, shards = _empty_files(tmp_path, 1000, 20), 64
    seed = tf.constant(0, tf.int64)
    held = np.zeros((shards, 1000), bool)
    for index in range(shards):
        held[index, _labels(source, source.shard(index, shards, seed))] = True
    partners = (held.T.astype(int) @ held[::-1].astype(int)) > 0  # [class, class]
    assert partners.sum(1).min() >= 200
    assert held.sum(0).min() >= 10  # nor is a class in few rows of a batch


@pytest.mark.parametrize("start", tiered([1, 14, 15, 16, 33], {16}))
def test_resume_at_a_step_gives_the_same_batches(root: pathlib.Path, reference: list[str], start: int) -> None:
    batches = itertools.islice(_loaders(root).train.batches(start), len(reference) - start)
    assert [_hash(batch) for batch in batches] == reference[start:]


@pytest.mark.parametrize("hosts", tiered([2, 8], {2}))
def test_global_batches_are_elastic_over_hosts(root: pathlib.Path, reference: list[str], hosts: int) -> None:
    loaders = [_loaders(root, host=Host(i, hosts)).train.batches(12) for i in range(hosts)]
    for step in range(12, 18):
        parts = [next(loader) for loader in loaders]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert _hash(whole) == reference[step]


def test_resume_reads_no_skipped_file(root: pathlib.Path) -> None:
    read = []

    class Spy(ImageFolder):
        def fetch(self, entry: Entry) -> Record:
            position = tf.numpy_function(lambda p: (read.append(int(p)), p)[1], [entry["position"]], tf.int64)
            return super().fetch({"position": tf.ensure_shape(position, [])})

    transform = eval_transform((8, 8), fraction=1.0, method="bilinear")
    loader = TrainLoader(Spy(str(root), "train"), transform, batch_size=BATCH, seed=0, virtual_shards=8)
    labels = [batch["label"] for batch in itertools.islice(_loaders(root).train.batches(), 15)]
    np.testing.assert_array_equal(next(loader.batches(14))["label"], labels[14])
    assert len(read) <= 3 * BATCH  # the batch and what is read ahead of it, of 240


@pytest.mark.parametrize("hosts", tiered([1, 3], {3}))
def test_eval_counts_every_image_once(root: pathlib.Path, hosts: int) -> None:
    loaders = [
        _loaders(root, batch_size=48, virtual_shards=48, host=Host(i, hosts)).evals["eval"] for i in range(hosts)
    ]
    labels = [batch["label"][batch["mask"]] for loader in loaders for batch in loader.batches()]
    assert np.bincount(np.concatenate(labels)).tolist() == [VAL] * 10


def test_all_image_formats_are_decoded_and_other_files_ignored(own: pathlib.Path) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for name in ("a.JPG", "b.jpeg", "c.JPEG", "d.bmp"):
        red.save(own / "val/cat" / name, "BMP" if name == "d.bmp" else "JPEG")
    red.save(own / "val/cat/e.gif", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    for name in (".hidden.png", "notes.txt", "f.svg"):
        (own / "val/cat" / name).write_bytes(b"no image")
    (own / "val/.hidden").mkdir()
    (own / "val/README.txt").write_text("read me")
    loaders = _loaders(own, batch_size=2, virtual_shards=2)
    (batch, *more) = loaders.evals["eval"].batches()
    images = np.concatenate([batch["image"], *(b["image"] for b in more)])
    masks = np.concatenate([batch["mask"], *(b["mask"] for b in more)])
    assert masks.sum() == loaders.evals["eval"].num_examples == 7
    assert loaders.info.class_names == ["cat", "dog"]
    assert (images[1:6, :, :, 0] >= 250).all()
    assert (images[1:6, :, :, 1:] <= 5).all()


def test_a_missing_file_is_named(own: pathlib.Path) -> None:
    loaders = _loaders(own, batch_size=2, virtual_shards=2)
    (own / "val/dog/1.png").unlink()
    with pytest.raises(DataError, match=r"val/dog/1\.png; No such file or directory; repair it"):
        list(loaders.evals["eval"].batches())


def test_a_missing_root_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"data.name='folder' needs data.root"):
        _loaders("")
    with pytest.raises(ValueError, match=r"data.root='.*/nowhere' is not a folder"):
        _loaders(tmp_path / "nowhere")


def test_a_missing_split_is_an_error(own: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ValueError, match=r"no folder 'validation'; data.train_split, data.eval_split .* train, val"):
        _loaders(own, eval_split="validation")
    with pytest.raises(ValueError, match=r"no folder 'train'; .* it has none"):
        _loaders(tmp_path_factory.mktemp("empty"))


def test_a_split_without_classes_is_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"/train of data.root has no sub-folders; each class needs one"):
        _loaders(tmp_path)


def test_empty_classes_are_named_with_their_other_files(own: pathlib.Path) -> None:
    for folder in ("ant", "bee"):
        (own / "train" / folder).mkdir()
    for name in ("1.svg", "2.svg", "notes"):
        (own / "train/bee" / name).write_bytes(b"")
    message = r"/train of data.root has classes without images \(.jpg, .*\): ant \(empty\), bee \(2 .svg, 1 no suffix\)"
    with pytest.raises(ValueError, match=message):
        _loaders(own)


def _names(source: ImageFolder, root: pathlib.Path) -> list[str]:
    """Paths below the root, in the order of the split."""
    names = [record["name"].decode() for record in source.shard(0, 1).map(source.fetch).as_numpy_iterator()]
    return [str(pathlib.Path(name).relative_to(root)) for name in names]


def test_deeper_folders_are_read_and_other_files_counted_in_a_warning(
    own: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("2021/may/a.png", "2021/b.webp", "c.tiff"):
        path = own / "val/cat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (0, 200, 0)).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    (own / "val/cat/2021/.trash").mkdir()
    (own / "val/cat/2021/.trash/d.png").write_bytes(b"")
    (own / "val/cat/notes.txt").write_bytes(b"")
    cats = ["val/cat/1.png", "val/cat/2021/b.webp", "val/cat/2021/may/a.png", "val/cat/c.tiff"]
    source = ImageFolder(str(own), "val")
    assert _names(source, own) == [*cats, "val/dog/1.png"]
    assert caplog.messages == [f"{own}/val: 1 files passed over, 1 .txt"]
    transform = eval_transform((8, 8), fraction=1.0, method="bilinear")
    (batch,) = EvalLoader(source, transform, batch_size=5).batches()
    np.testing.assert_array_equal(batch["image"][1:4], np.full((3, 8, 8, 3), (0, 200, 0)))

    caplog.clear()
    monkeypatch.setattr(image_folder, "has_pillow", lambda: False)
    assert _names(ImageFolder(str(own), "val"), own) == [cats[0], cats[2], "val/dog/1.png"]
    assert caplog.messages == [
        f"{own}/val: 3 files passed over, 1 .tiff, 1 .txt, 1 .webp; WebP and TIFF need Pillow: pip install pillow"
    ]


@pytest.fixture
def unsplit(tmp_path: pathlib.Path) -> pathlib.Path:
    """root/<class>/ with ten cats and five dogs, and no folder of a split."""
    for name, count in {"cat": 10, "dog": 5}.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_a_folder_without_splits_is_split_within_each_class_and_always_the_same(unsplit: pathlib.Path) -> None:
    train, val = (ImageFolder(str(unsplit), split) for split in ("train", "val"))
    assert train.info == DatasetInfo(["cat", "dog"], 12, "folder")
    names = [_names(source, unsplit) for source in (train, val)]
    assert sorted([*names[0], *names[1]]) == sorted(str(path.relative_to(unsplit)) for path in unsplit.glob("*/*"))
    assert names[1] == ["cat/0.png", "cat/6.png", "dog/0.png"]
    assert _names(ImageFolder(f"{unsplit}/", "validation"), unsplit) == names[1]


def test_a_slice_of_a_split_takes_its_part_of_each_class(unsplit: pathlib.Path) -> None:
    (unsplit / "all").mkdir()
    for name in ("cat", "dog"):
        (unsplit / name).rename(unsplit / "all" / name)
    first, rest = (_names(ImageFolder(str(unsplit), split), unsplit) for split in ("all[:40%]", "all[40%:]"))
    assert [sum("cat" in name for name in names) for names in (first, rest)] == [4, 6]
    assert [sum("dog" in name for name in names) for names in (first, rest)] == [2, 3]
    assert not set(first) & set(rest)
    with pytest.raises(
        ValueError, match=r"the split 'all\[:40\]' of data.name='folder' must be a name, or like train\["
    ):
        ImageFolder(str(unsplit), "all[:40]")
    with pytest.raises(ValueError, match=r"has no image in the split 'all\[:1%\]'"):
        ImageFolder(str(unsplit), "all[:1%]")


def test_a_csv_file_names_images_and_labels(unsplit: pathlib.Path) -> None:
    table = unsplit / "labels.csv"
    rows = [f"{path.relative_to(unsplit)},{path.parent.name}" for path in sorted(unsplit.glob("*/*"))]
    table.write_text("\n".join(["file, label", *rows]))
    train, val = (ImageFolder(str(table), split) for split in ("train", "val"))
    assert (train.info.class_names, train.info.num_examples, val.info.num_examples) == (["cat", "dog"], 12, 3)
    with_splits = [f"{row},{'test' if '/1.png' in row else 'train'}" for row in rows]
    table.write_text("\n".join(["file,label,split", *with_splits]))
    assert _names(ImageFolder(str(table), "test"), unsplit) == ["cat/1.png", "dog/1.png"]
    with pytest.raises(ValueError, match=r"labels.csv' has no split 'val'; its column has test, train"):
        ImageFolder(str(table), "val")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a first line with the columns image and label .* it has nothing"),
        ("name,kind\na,b", "needs a first line with the columns image and label .* it has name, kind"),
        ("image,label\ncat/0.png,cat\ncat/1.png,", "lacks an image or a label in line 3"),
        ("image,label\nlost.png,cat", r"names 1 files that are not there: .*/lost.png"),
    ],
)
def test_a_csv_file_that_cannot_be_used_is_an_error(text: str, message: str, unsplit: pathlib.Path) -> None:
    (unsplit / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"data.root='{unsplit}/labels.csv' {message}"):
        ImageFolder(str(unsplit / "labels.csv"), "train")
    with pytest.raises(ValueError, match=r"data.root='/nowhere.csv' cannot be read"):
        ImageFolder("/nowhere.csv", "train")


def test_too_few_images_for_a_batch_are_answered_with_a_batch_size_that_fits(unsplit: pathlib.Path) -> None:
    with pytest.raises(
        ValueError, match=r"batch_size=128 .* 12 examples .*; set e.g. batch_size=8 and data.virtual_sh"
    ):
        _loaders(unsplit, batch_size=128)
    assert _loaders(unsplit, batch_size=8, virtual_shards=1).train.steps_per_epoch == 1


def _small(root: pathlib.Path, **changes: Any) -> ConfigDict:
    """The config of own images on two narrow blocks and images of 16 pixels."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.num_epochs = 2
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


@pytest.mark.slow
def test_the_folder_config_trains_given_only_its_root(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = run_experiment(_small(root), tmp_path / "run")
    assert result["step"] == 2  # two epochs of 240 images in batches of 128
    assert np.isfinite(result["eval"]["loss"])
    assert json.loads((tmp_path / "run/dataset.json").read_text())["class_names"] == NAMES
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["root"] == str(root)


@pytest.fixture
def spoilt(root: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The digits, and a page that is named as an image."""
    shutil.copytree(root, tmp_path / "images")
    (tmp_path / "images/train/digit 3/005.png").write_text("<html>")
    return tmp_path / "images"


EVERY_IMAGE = {"batch_size": 48, "data.virtual_shards": 16}  # in every epoch


@pytest.mark.slow  # half a minute to compile
def test_the_command_answers_a_decode_error_with_one_line(
    spoilt: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_experiment(_small(spoilt, **EVERY_IMAGE), tmp_path / "run")
    assert ended.value.code == app.ExitCode.BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(
        f"error: {spoilt}/train/digit 3/005.png cannot be decoded (by its first bytes it is no JPEG, PNG, GIF or BMP"
    )


@pytest.mark.slow
def test_the_command_finishes_where_bad_images_are_replaced(
    spoilt: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run_experiment(_small(spoilt, **EVERY_IMAGE, **{"data.on_bad_image": "replace"}), tmp_path / "run")
    assert result["step"] == 10
    assert np.isfinite([result["eval"]["loss"], result["ema_eval"]["loss"]]).all()
    messages = [record.getMessage() for record in caplog.records if record.name == "halvit_jax.data"]
    assert messages == [f"replaced images that cannot be decoded, 1 so far: {spoilt}/train/digit 3/005.png"]


def test_a_wrong_num_classes_is_answered_with_the_field(
    root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_experiment(_small(root, **{"model.num_classes": 12}), tmp_path / "run")
    assert ended.value.code == app.ExitCode.BAD_INPUT
    assert "data.name='folder' has 10 classes; set model.num_classes=10" in capsys.readouterr().err
