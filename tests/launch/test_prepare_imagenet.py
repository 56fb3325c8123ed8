"""ImageNet from its archives to the loss: the real script, the real TFDS builder, the real config; small images."""

import hashlib
import itertools
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from helpers import small_imagenet
from helpers.tiers import tiered
from ml_collections import ConfigDict

from halvit_jax.config import default_config
from halvit_jax.data.pipeline import Loaders, make_loaders
from halvit_jax.data.sources import open_source
from halvit_jax.main import run_experiment

ROOT = pathlib.Path(__file__).parents[2]

FORMATS = ("tfrecord", "array_record")


def prepare(*arguments: str | pathlib.Path, code: int = 0, path: str = os.environ["PATH"]) -> str:
    """Run launch/prepare_imagenet.sh; its output, after an exit code as expected."""
    environment = os.environ | {"PYTHON": sys.executable, "PATH": path}
    command = ["bash", "launch/prepare_imagenet.sh", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the two small archives."""
    folder = tmp_path_factory.mktemp("archives")
    small_imagenet.write_archives(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(archives: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """File format -> `data_dir` with the small ImageNet: by the script, and by the same builder as ArrayRecord."""
    folders = {name: tmp_path_factory.mktemp(name) for name in FORMATS}
    output = prepare(archives, folders["tfrecord"], "--any-size")
    assert "prepared as tfrecord: 24 training and 20 validation images" in output
    builder = tfds.builder("imagenet2012", data_dir=str(folders["array_record"]))
    manual = tfds.download.DownloadConfig(manual_dir=str(archives))
    builder.download_and_prepare(file_format="array_record", download_config=manual)
    return folders


def _loaders(data_dir: pathlib.Path, **changes: Any) -> Loaders:
    fields = default_config().data.to_dict() | {"data_dir": str(data_dir), "virtual_shards": 4, **changes}
    return make_loaders(**fields, batch_size=8, size=(64, 64), seed=0)


@pytest.mark.slow
def test_prepare_imagenet_reports_what_is_already_prepared(prepared: dict[str, pathlib.Path]) -> None:
    output = prepare(prepared["tfrecord"], prepared["array_record"])  # needs no archives any more
    assert "already prepared as array_record: 24 training and 20 validation images" in output
    assert f"--config.data.data_dir={prepared['array_record']}" in output


@pytest.mark.slow  # it starts processes
def test_prepare_imagenet_reports_missing_files(prepared: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared["tfrecord"], data)
    (lost,) = data.glob("*/*/imagenet2012-validation*")
    lost.unlink()
    assert f"lacks 1 of 1 files in {lost.parent}: {lost.name}" in prepare(tmp_path, data, code=2)


def test_prepare_imagenet_reports_a_missing_or_wrong_archive(archives: pathlib.Path, tmp_path: pathlib.Path) -> None:
    train, val = (f"ILSVRC2012_img_{split}.tar" for split in ("train", "val"))
    tars, data, tools = (tmp_path / name for name in ("tars", "data", "tools"))
    assert f"error: {tars} is not a folder" in prepare(tars, data, code=2)
    tars.mkdir()
    assert f"{tars / train} is missing; https://image-net.org/download-images" in prepare(tars, data, code=2)
    shutil.copy(archives / train, tars)
    size = (archives / train).stat().st_size
    assert f"{train} has {size} bytes, the official archive 147897477120;" in prepare(tars, data, code=2)
    assert f"{tars / val} is missing" in prepare(tars, data, "--any-size", code=2)
    with (tars / train).open("wb") as file:
        file.truncate(147897477120)  # a hole, which takes no space
    assert f"{tars / val} is missing" in prepare(tars, data, code=2)
    tools.mkdir()
    (tools / "md5sum").write_text("#!/bin/sh\necho '0123 -'\n")  # the real one would read 148 GB
    (tools / "md5sum").chmod(0o755)
    output = prepare(tars, data, "--md5", code=2, path=f"{tools}:{os.environ['PATH']}")
    assert f"{train} has the MD5 sum 0123, the official archive 1d675b47d978889d74fa0da5fadfb00e" in output


def test_prepare_imagenet_rejects_unknown_arguments(tmp_path: pathlib.Path) -> None:
    assert "give two folders: bash launch/prepare_imagenet.sh TARS_DIR DATA_DIR" in prepare(tmp_path, code=2)
    assert "too many folders" in prepare("a", "b", "c", code=2)
    assert "--md6 is unknown" in prepare("a", "b", "--md6", code=2)


@pytest.mark.parametrize("file_format", tiered(FORMATS, FORMATS[:1]))
def test_imagenet_loaders_deliver_every_image_with_its_label(
    file_format: str, prepared: dict[str, pathlib.Path]
) -> None:
    loaders = _loaders(prepared[file_format])
    assert len(loaders.info.class_names) == 1000
    assert loaders.info.class_names[:2] == ["n01440764", "n01443537"]
    epoch = list(itertools.islice(loaders.train.batches(), loaders.train.steps_per_epoch))
    labels = Counter(int(label) for batch in epoch for label in batch["label"])
    assert labels == dict.fromkeys(small_imagenet.SYNSETS.values(), small_imagenet.PER_SYNSET)
    assert {batch["image"].shape for batch in epoch} == {(8, 64, 64, 3)}
    assert min(image.std() for batch in epoch for image in batch["image"]) > 1
    assert sum(batch["mask"].sum() for batch in loaders.evals["eval"].batches()) == small_imagenet.VALIDATION


def test_tfrecord_and_array_record_evaluate_imagenet_in_the_same_order(prepared: dict[str, pathlib.Path]) -> None:
    def examples(file_format: str, split: str) -> list[tuple[str, int]]:
        source = open_source("imagenet2012", str(prepared[file_format]), split)
        data = source.shard(0, 1).map(source.fetch)
        return [(hashlib.sha256(r["image"]).hexdigest(), int(r["label"])) for r in data.as_numpy_iterator()]

    for split in ("train", "validation"):
        assert examples("tfrecord", split) == examples("array_record", split)
        assert len(set(examples("tfrecord", split))) == {"train": 24, "validation": 20}[split]
    first, second = (list(_loaders(prepared[name]).evals["eval"].batches()) for name in FORMATS)
    for ours, theirs in zip(first, second, strict=True):
        assert all((ours[name] == theirs[name]).all() for name in ours)


def test_imagenet_validation_labels_are_those_of_the_official_list(prepared: dict[str, pathlib.Path]) -> None:
    source = open_source("imagenet2012", str(prepared["tfrecord"]), "validation")
    data = source.shard(0, 1).map(source.fetch)
    found = Counter(source.info.class_names[int(record["label"])] for record in data)
    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    assert found == Counter(labels[: small_imagenet.VALIDATION])


def test_png_and_cmyk_files_of_imagenet_become_rgb_jpegs(prepared: dict[str, pathlib.Path]) -> None:
    builder = tfds.builder("imagenet2012", data_dir=str(prepared["tfrecord"]))
    raw = builder.as_dataset(split="train", decoders={"image": tfds.decode.SkipDecoding()})
    images = {example["file_name"].numpy().decode(): example["image"] for example in raw}
    assert {small_imagenet.PNG, small_imagenet.CMYK} <= set(images)
    for image in images.values():
        assert tf.io.is_jpeg(image)
        assert tf.io.extract_jpeg_shape(image)[2] == 3


def _config(data_dir: pathlib.Path, **changes: Any) -> ConfigDict:
    """Two steps of configs/halvit_tiny.py with its whole recipe."""
    config = runpy.run_path(str(ROOT / "configs/halvit_tiny.py"))["get_config"]()
    config.update_from_flattened_dict(
        {
            "data.data_dir": str(data_dir),
            "batch_size": 8,
            "num_epochs": 0,
            "total_steps": 2,
            "optim.warmup_epochs": 0.0,
            "loop.log_every": 1,
        }
        | changes
    )
    return config


@pytest.mark.slow
def test_the_halvit_tiny_config_trains_on_imagenet(prepared: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    result = run_experiment(_config(prepared["tfrecord"]), tmp_path)
    assert result["step"] == 2
    assert result["params"] == 11_415_400
    assert np.isfinite([result["eval"]["loss"], result["ema_eval"]["loss"]]).all()


@pytest.mark.slow
def test_the_halvit_tiny_recipe_trains_a_small_model(prepared: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    small = {"model.image_size": 64, "model.width": 32, "model.depth": 1, "model.num_heads": 2}
    result = run_experiment(_config(prepared["array_record"], **small), tmp_path)
    assert result["step"] == 2
    assert np.isfinite([result["eval"]["loss"], result["ema_eval"]["loss"]]).all()


@pytest.mark.slow  # it starts processes
def test_a_process_exits_while_batches_are_read_ahead(prepared: dict[str, pathlib.Path]) -> None:
    """Training ends with the loader still reading ahead, and ArrayRecord is read by Python on TensorFlow's threads."""
    program = """
from halvit_jax.config import default_config
from halvit_jax.data import make_loaders
fields = default_config().data.to_dict() | {"virtual_shards": 4}
loaders = [make_loaders(**fields | {"data_dir": d}, batch_size=8, size=(64, 64), seed=0) for d in FOLDERS]
alive = [loader.train.batches() for loader in loaders]
print([next(batches)["image"].shape for batches in alive])
"""
    program = program.replace("FOLDERS", repr([str(folder) for folder in prepared.values()]))
    command = [sys.executable, "-c", program]
    # Several at once, for it is a matter of timing: unmended, half of them did not end.
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    try:
        output = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (out, err) in zip(running, output, strict=True):
        assert process.returncode == 0, err
        assert out.strip() == str([(8, 64, 64, 3)] * 2)
        assert "Exception" not in err
        assert "Traceback" not in err
