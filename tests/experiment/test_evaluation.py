"""Weights that were not trained here, evaluated by the command: digits, and a small ImageNet with -V2 and -ReaL."""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from helpers import small_imagenet
from helpers.configs import load
from helpers.processes import run_command
from helpers.runs import MAIN, Finished, tiny
from ml_collections import ConfigDict

import halvit_jax
from halvit_jax.convert import readers, shapes_of, to_torch
from halvit_jax.data.sources import open_source, open_sources
from halvit_jax.experiment import evaluation
from halvit_jax.main import evaluate_weights
from halvit_jax.models import create_model
from halvit_jax.trees import unflatten

REAL = [[], [1, 230], [999], *([[5, 7]] * 17)]  # labels of the twenty validation images


@pytest.fixture(scope="module")
def torch_file(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The averaged weights of the small run on digits, converted to PyTorch's names."""
    model, variables = halvit_jax.load(finished[0])
    fields = {name: getattr(model, name) for name in ("width", "depth", "num_heads", "patch_size")}
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    readers.write(path, to_torch("halvit_tiny", variables, **fields, num_classes=10, image_size=8), {})
    return path


def test_converted_weights_score_on_digits_as_in_the_run_that_trained_them(
    torch_file: pathlib.Path, finished: Finished, digits_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(digits_dir, **{"init_from": str(torch_file), "data.train_split": "there is none"})
    result = evaluate_weights(config)
    assert result == {"eval": pytest.approx(finished[1]["ema_eval"])}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"init_from={torch_file}: ")
    assert lines[-2].startswith("step 0  eval  loss ")
    assert json.loads(lines[-1]) == result


def test_a_folder_without_training_images_is_evaluated(
    torch_file: pathlib.Path, digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The first 32 test digits in folders, and as the same split of TFDS."""
    config = tiny(digits_dir, **{"init_from": str(torch_file), "data.eval_split": "test[:32]"})
    source = open_source("digits", str(digits_dir), "test[:32]")
    for number, record in enumerate(source.shard(0, 1).map(source.fetch).as_numpy_iterator()):
        path = tmp_path / f"val/{record['label']}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record["image"])
    folder = {"data.name": "folder", "data.root": str(tmp_path), "data.data_dir": "", "data.eval_split": "val"}
    other = tiny(digits_dir, **{"init_from": str(torch_file), **folder})
    assert evaluate_weights(other)["eval"] == pytest.approx(evaluate_weights(config)["eval"], rel=1e-5)


@pytest.mark.slow  # a process of its own
def test_the_command_evaluates_converted_weights_without_a_workdir(
    torch_file: pathlib.Path, finished: Finished, digits_dir: pathlib.Path
) -> None:
    fields = {"model.width": 32, "model.depth": 2, "model.num_heads": 2, "data.data_dir": digits_dir, "batch_size": 32}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    command = ["--config=configs/halvit_digits.py", "--mode=eval", f"--config.init_from={torch_file}", *overrides]
    found = json.loads(run_command(MAIN, *command).stdout.splitlines()[-1])
    assert found == {"eval": pytest.approx(finished[1]["ema_eval"], rel=1e-5)}
    assert "--step=4 is for --mode=eval with a --workdir" in run_command(MAIN, *command, "--step=4", code=2).stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_classes": 12}, "lacks arrays that an evaluation needs: params/head/bias (12,)"),
        ({"init_exclude": ("^norm/",)}, "set model.num_classes and init_exclude to fit the weights"),
        ({"data.eval_split": "val"}, "data.eval_split='val': split 'val' of data.name='digits' is unknown"),
        ({"init_from": "/nowhere.npz"}, "init_from=/nowhere.npz: /nowhere.npz does not exist"),
    ],
)
def test_weights_or_data_that_do_not_do_are_refused_with_one_line(
    changes: dict[str, Any],
    message: str,
    torch_file: pathlib.Path,
    digits_dir: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate_weights(tiny(digits_dir, **{"init_from": str(torch_file), **changes}))
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.fixture(scope="module")
def imagenets(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A `data_dir` with the validation images of the small ImageNet as imagenet2012, imagenet_v2 and -ReaL."""
    archives, downloads, data = (tmp_path_factory.mktemp(name) for name in ("archives", "downloads", "data"))
    small_imagenet.write_archives(archives)
    (downloads / "real.json").write_text(json.dumps(REAL))
    v2 = downloads / "imagenetv2-matched-frequency-format-val"
    builder = tfds.builder("imagenet2012", data_dir=str(data))
    manual = tfds.download.DownloadConfig(manual_dir=str(archives))
    builder.download_and_prepare(file_format="array_record", download_config=manual)
    for label in (0, 7):
        (v2 / str(label)).mkdir(parents=True)
        (v2 / str(label) / "a.jpeg").write_bytes(tf.io.encode_jpeg(np.full((300, 200, 3), 9 * label, np.uint8)).numpy())
    with pytest.MonkeyPatch.context() as patch:
        manager = tfds.download.DownloadManager
        patch.setattr(manager, "download", lambda self, url: str(downloads / "real.json"))
        patch.setattr(manager, "download_and_extract", lambda self, url: str(downloads))
        for name in ("imagenet2012_real", "imagenet_v2"):
            tfds.builder(name, data_dir=str(data)).download_and_prepare(download_config=manual)
    shutil.rmtree(downloads)
    return data


def shvit(imagenets: pathlib.Path, weights: pathlib.Path, **changes: Any) -> ConfigDict:
    """SHViT-S4 of two narrow stages, with its whole evaluation."""
    config = load("shvit:s4")
    fields = {f"model.{name}": value for name, value in TINY.items()} | {"batch_size": 8, "init_from": str(weights)}
    config.update_from_flattened_dict(fields | {"data.data_dir": str(imagenets)} | changes)
    return config


TINY = {"depths": (1, 1), "widths": (16, 24), "partial_dims": (8, 8), "stages": ("i", "s"), "image_size": 64}


@pytest.fixture(scope="module")
def shvit_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Weights of that SHViT with PyTorch's names, such as another program has written them.

    Whatever the image, they answer class 7, then 230.
    """
    shapes, rng = shapes_of(create_model("shvit_s4", **TINY)).items(), np.random.default_rng(0)
    arrays = {path: rng.uniform(0.1, 0.2, shape).astype(np.float32) for path, shape in shapes}
    arrays["params/head/linear/bias"][[7, 230]] = 1e6, 1e5
    path = tmp_path_factory.mktemp("shvit") / "shvit_s4.safetensors"
    readers.write(path, to_torch("shvit_s4", unflatten(arrays), **TINY), {})
    return path


def test_real_labels_are_all_that_are_right(imagenets: pathlib.Path) -> None:
    source = open_source("imagenet2012_real", str(imagenets), "validation")
    assert source.info.class_names == open_source("imagenet2012", str(imagenets), "validation").info.class_names
    records = source.shard(0, 1).map(source.fetch).as_numpy_iterator()
    found = sorted(np.flatnonzero(record["label"]).tolist() for record in records)
    assert found == sorted(REAL)


def test_one_command_evaluates_pytorch_weights_on_imagenet_v2_and_real_beside_the_published_figure(
    imagenets: pathlib.Path, shvit_file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evals = ("v2=imagenet_v2:test", "real=imagenet2012_real:validation")
    source = open_source("imagenet2012", str(imagenets), "validation")
    labels = [record["label"] for record in source.shard(0, 1).map(source.fetch).as_numpy_iterator()]
    config = shvit(imagenets, shvit_file, **{"data.evals": evals})
    result = evaluate_weights(config)
    assert list(result) == ["eval", "eval_v2", "eval_real"]
    top1 = 100 * result["eval"]["top1"]
    lines = capsys.readouterr().out.splitlines()
    assert f"eval  top1 {top1:.2f}%, published 79.40% ({top1 - 79.4:+.2f})" in lines

    # 19 images of -ReaL have labels. 17 of them have the class that these weights always answer, one their second.
    assert (result["eval_real"]["top1"], result["eval_real"]["top5"]) == (
        pytest.approx(17 / 19),
        pytest.approx(18 / 19),
    )
    assert result["eval_v2"]["top1"] == 0.5
    assert result["eval"]["top1"] == np.mean([label == 7 for label in labels])


def test_a_distilled_student_is_evaluated_without_its_teacher() -> None:
    config = load("shvit:s4,distilled")
    alone = evaluation.without_teacher(config)
    assert (config.task.name, alone.task.name) == ("distillation", "classification")
    assert alone.published_top1 == 80.2


def test_a_set_with_several_labels_is_not_trained_on(imagenets: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"data.name='imagenet2012_real' has several labels an image"):
        open_sources("imagenet2012_real", str(imagenets), "", "validation", "", "validation")


def test_the_published_figure_stands_beside_every_result_and_is_compared_on_its_own_data_set() -> None:
    config = load("shvit:s4")
    results = {"eval": {"top1": 0.5}, "eval_v2": {"top1": 0.4}}
    first, second = evaluation.published_lines(config, results)
    assert first == "eval  top1 50.00%, published 79.40% (-29.40)"
    assert second == "eval_v2  top1 40.00%, published 79.40% on imagenet2012"
    config.data.eval_name = "imagenet_v2"
    assert evaluation.published_lines(config, results)[0] == "eval  top1 50.00%, published 79.40% on imagenet2012"
    config.published_top1 = 0.0
    assert evaluation.published_lines(config, results) == []


@pytest.mark.slow
def test_a_run_is_evaluated_at_another_size_with_resampled_positions(
    finished: Finished, digits_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(digits_dir, **{"init_from": str(finished[0]), "model.image_size": 12})
    result = evaluate_weights(config)["eval"]
    assert "adapted: params/position/embedding (17, 32) -> (37, 32)" in capsys.readouterr().out
    source = open_source("digits", str(digits_dir), "test")
    records = list(source.shard(0, 1).map(source.fetch).as_numpy_iterator())
    predictor = halvit_jax.load_predictor(finished[0], image_size=12)
    images = [tf.io.decode_png(record["image"]).numpy() for record in records]
    right = [
        row["top1"][0]["class"] == str(record["label"])
        for row, record in zip(predictor(images, top=1), records, strict=True)
    ]
    assert np.mean(right) == pytest.approx(result["top1"])
