"""COCO from its archives, and a set of one's own, to loaders: the real script on small sets."""

import json
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest
from helpers import small_coco

from halvit_jax.config import default_config
from halvit_jax.data import make_detection_loaders

ROOT = pathlib.Path(__file__).parents[2]


def prepare(*arguments: str | pathlib.Path, code: int = 0) -> str:
    """Run launch/prepare_coco.sh; its output, after an exit code as expected."""
    command = ["bash", str(ROOT / "launch/prepare_coco.sh"), *map(str, arguments)]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Somebody's set: train.json, eval.json and the folders train and eval."""
    folder = tmp_path_factory.mktemp("own set")
    small_coco.write(folder, small_coco.content(), small_coco.content(5))
    return folder


def _archives(folder: pathlib.Path, own: pathlib.Path) -> pathlib.Path:
    """The three archives, with that set in them."""
    folder.mkdir()
    content = {"train2017": own / "train", "val2017": own / "eval"}
    for name, images in content.items():
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for image in images.iterdir():
                archive.write(image, f"{name}/{image.name}")
    with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w") as archive:
        for split, name in {"train": "train2017", "eval": "val2017"}.items():
            archive.write(own / f"{split}.json", f"annotations/instances_{name}.json")
    return folder


def _batch_ids(root: pathlib.Path) -> list[int]:
    """The images of an evaluation with the default names of files."""
    fields = {"root": str(root), "canvases": ((64, 64),), "short_side": 0}
    loaders = make_detection_loaders(**default_config().instances.to_dict() | fields, batch_size=5, seed=0)
    (batch,) = loaders.evals["eval"].batches()
    return batch["image_id"].tolist()


@pytest.mark.slow
def test_prepare_coco_unpacks_the_archives_and_describes_them(own: pathlib.Path, tmp_path: pathlib.Path) -> None:
    archives, data = _archives(tmp_path / "archives", own), tmp_path / "data"
    output = prepare(archives, data)
    for words in (
        "unpacking",
        "7 images, 5 of them used",
        "eval: 5 images were read",
        f"--config.instances.root={data}",
    ):
        assert words in output
    assert not (data / "unpacking").exists()
    assert _batch_ids(data) == [100, 101, 102, 103, 104]


@pytest.mark.slow  # it starts a process
def test_prepare_coco_links_a_set_of_ones_own(own: pathlib.Path, tmp_path: pathlib.Path) -> None:
    sets = [f"--{split}={own / split}.json:{own / split}" for split in ("train", "eval")]
    output = prepare(*sets, tmp_path / "data", "--most=2")
    assert "eval: 2 images were read and have the size that the file says" in output
    assert (tmp_path / "data/train2017").is_symlink()
    assert _batch_ids(tmp_path / "data") == [100, 101, 102, 103, 104]


@pytest.mark.slow  # it starts processes
def test_prepare_coco_links_unpacked_folders_and_reports_what_is_wrong_in_them(
    own: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source, data = tmp_path / "source", tmp_path / "data"
    small_coco.write(source, small_coco.content())
    (source / "annotations").mkdir()
    for split, name in {"train": "train2017", "eval": "val2017"}.items():
        (source / split).rename(source / name)
        (source / f"{split}.json").rename(source / f"annotations/instances_{name}.json")
    assert "7 images" in prepare(source, data)
    (source / "val2017/3.png").unlink()
    assert "lacks 1 of the 7 images" in prepare(source, data, code=2)
    annotations = source / "annotations/instances_train2017.json"
    annotations.write_text(json.dumps({**json.loads(annotations.read_text()), "images": []}))
    assert "0 images" in prepare(source, data, code=2)


def test_prepare_coco_reports_archives_that_are_missing_or_broken(own: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data, archives = tmp_path / "data", tmp_path / "archives"
    assert f"error: {archives} is no folder" in prepare(archives, data, code=2)
    _archives(archives, own)
    (archives / "train2017.zip").unlink()
    assert "neither the folder train2017 nor train2017.zip; https://cocodataset.org" in prepare(archives, data, code=2)
    (archives / "train2017.zip").write_bytes(b"no archive")
    assert "train2017.zip is no whole archive; download it again" in prepare(archives, data, code=2)
    (archives / "val2017.zip").rename(archives / "train2017.zip")
    assert "train2017.zip has no folder train2017" in prepare(archives, data, code=2)


def test_prepare_coco_rejects_unknown_arguments(own: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert "give two folders: bash launch/prepare_coco.sh SOURCE DATA" in prepare(tmp_path, code=2)
    assert "--md5 is unknown; there are --train=" in prepare("--md5", code=2)
    assert "--most=few must be a number" in prepare("--most=few", code=2)
    train = f"--train={own}/train.json:{own}/train"
    assert "go together" in prepare(train, tmp_path, code=2)
    assert "give one folder with --train and --eval" in prepare(train, "--eval=b:c", code=2)
    for wrong, words in {"b": "must be ANN", f"{own}/b:c": "b is no file", f"{own}/eval.json:c": "c is no fol"}.items():
        assert words in prepare(train, f"--eval={wrong}", tmp_path / "data", code=2)
