"""The command that predicts images with a trained model, and draws its attention."""

import csv
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow as tf
from helpers.processes import run_command
from helpers.runs import Finished, classification

from halvit_jax import data, predict
from halvit_jax.experiment.predictor import load_predictor
from halvit_jax.models import create_model
from halvit_jax.protocols import ServingModel

PREDICT = "halvit_jax.predict"


def test_predict_goes_on_after_a_file_that_is_no_image(
    finished: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    page, digit = tmp_path / "page.jpg", tmp_path / "digit.png"
    page.write_text("<html>")
    tf.io.write_file(str(digit), tf.io.encode_png(np.full((8, 8, 1), 100, np.uint8)))
    logged = run_command(PREDICT, f"--workdir={finished[0]}", str(page), str(digit), code=1).stdout
    rows = [json.loads(line) for line in logged.splitlines()]
    assert "is not an image" in rows[0]["error"]
    assert [row["image"] for row in rows] == [str(page), str(digit)]
    assert len(rows[1]["top5"]) == 5
    probabilities = [entry["probability"] for entry in rows[1]["top5"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) <= 1.0001
    assert {entry["class"] for entry in rows[1]["top5"]} <= {str(i) for i in range(10)}


def test_predict_agrees_with_the_evaluation(
    finished: tuple[pathlib.Path, dict[str, Any]], digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    from halvit_jax.data import open_source

    workdir, result = finished
    source = open_source("digits", str(digits_dir), "test")
    records = list(source.shard(0, 1).map(source.fetch).as_numpy_iterator())
    paths = [tmp_path / f"{i}.png" for i in range(len(records))]
    for path, record in zip(paths, records, strict=True):
        path.write_bytes(record["image"])
    rows = predict.predict(load_predictor(workdir), [str(path) for path in paths])
    right = [row["top5"][0]["class"] == str(record["label"]) for (row, _), record in zip(rows, records, strict=True)]
    assert np.mean(right) == pytest.approx(result["ema_eval"]["top1"])


def test_predict_draws_attention(finished: Finished, tmp_path: pathlib.Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    data.write_png(str(tmp_path / "digit.png"), image)
    out, page = tmp_path / "attention.png", tmp_path / "page.jpg"
    page.write_text("<html>")
    command = ["halvit_jax.predict", f"--workdir={finished[0]}"]
    files = [str(tmp_path / "digit.png"), str(page)]
    assert len(run_command(*command, f"--attention={out}", *files, code=1).stdout.splitlines()) == 2
    drawn = tf.io.decode_png(out.read_bytes()).numpy()
    assert drawn.shape == (224, 448, 3)
    np.testing.assert_array_equal(drawn[:, :224], image.repeat(28, 0).repeat(28, 1))
    assert (drawn[:, :224] != drawn[:, 224:]).any()
    assert "must end in .png" in run_command(*command, "--attention=x.jpg", *files, code=2).stderr
    with pytest.raises(ValueError, match=r"digit.png/x.png cannot be written"):
        data.write_png(f"{tmp_path}/digit.png/x.png", image)


def test_attention_of_a_model_that_has_none_is_refused() -> None:
    model = ServingModel(apply=lambda variables, images: images, variables={}, input_size=(8, 8))
    with pytest.raises(ValueError, match="--attention: this task's model has no attention maps"):
        predict.attention_over(model, np.zeros((8, 8, 3), np.uint8))


def test_predict_takes_folders_a_step_and_the_number_of_classes_and_keeps_letters(
    finished: Finished, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("Blüte/a.png", "b.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data.write_png(str(tmp_path / name), np.zeros((8, 8, 3), np.uint8))
    flags = (f"--workdir={finished[0]}", "--step=best", "--top=3", str(tmp_path))
    lines = run_command(PREDICT, *flags).stdout.splitlines()
    assert [json.loads(line)["image"] for line in lines] == [f"{tmp_path}/Blüte/a.png", f"{tmp_path}/b.png"]
    assert all(len(json.loads(line)["top3"]) == 3 for line in lines)
    assert "Blüte" in lines[0]
    table = tmp_path / "out.csv"
    flags = (f"--workdir={finished[0]}", "--top=2", "--image_size=12", f"--csv={table}")
    larger = run_command(PREDICT, *flags, f"{tmp_path}/**/*.png").stdout.splitlines()
    written = list(csv.DictReader(table.read_text().splitlines()))
    assert list(written[0]) == ["image", "class1", "probability1", "class2", "probability2"]
    for row, line in zip(written, map(json.loads, larger), strict=True):
        best, second = line["top2"]
        assert (row["image"], row["class1"], row["class2"]) == (line["image"], best["class"], second["class"])
        assert float(row["probability1"]) == best["probability"]
    (tmp_path / "empty").mkdir()
    for wrong, message in (
        (tmp_path / "empty", "empty holds no images"),
        ("--csv=no/such/folder/out.csv", "--csv=no/such/folder/out.csv is in a folder that does not exist"),
        ("--image_size=0", "--image_size=0 must be at least 1"),
        ("--top=0", "--top=0 must be at least 1"),
    ):
        assert message in run_command(PREDICT, f"--workdir={finished[0]}", "a.png", str(wrong), code=2).stderr


def test_flags_of_classification_are_refused_with_a_detector() -> None:
    predict.refuse_flags({"top": None, "csv": None})
    for flag, value in {"top": 3, "csv": "a.csv"}.items():
        with pytest.raises(ValueError, match=rf"--{flag}={value} is for classification, and this run has task.name='d"):
            predict.refuse_flags({flag: value})


def test_a_pattern_stands_for_the_files_that_match(tmp_path: pathlib.Path) -> None:
    for name in ("a/x.png", "a/b/y.png", "[1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = predict._files([f"{tmp_path}/a/**/*.png", f"{tmp_path}/[1].png"])  # the last is a file of that name
    assert found == [f"{tmp_path}/{name}" for name in ("a/b/y.png", "a/x.png", "[1].png")]
    with pytest.raises(ValueError, match=r"\*.webp matches no file"):
        predict._files([f"{tmp_path}/*.webp"])


def test_a_row_of_a_table_has_the_classes_in_order_and_errors_last() -> None:
    row = {"image": "a.png", "top2": [{"class": "x", "probability": 0.7}, {"class": "y", "probability": 0.3}]}
    bad = {"image": "b.png", "error": "is not an image"}
    columns = sorted({**predict._csv_row(row), **predict._csv_row(bad)}, key=predict._column)
    assert columns == ["image", "class1", "probability1", "class2", "probability2", "error"]


@pytest.mark.slow
def test_attention_in_windows_is_drawn_where_one_window_is_the_image() -> None:
    shape = {"width": 8, "depths": (1,), "head_width": 4, "image_size": 16, "num_classes": 3}
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)

    def draw(window: int) -> np.ndarray:
        task = classification(create_model("swin_tiny", **shape, window_size=window))
        variables = {"params": jax.jit(task.init)(jax.random.key(0))[0]}
        return predict.attention_over(task.serving(variables, folded=False), image)

    drawn = draw(4)  # as large as the map
    np.testing.assert_array_equal(drawn[:, :224], image.repeat(14, 0).repeat(14, 1))
    assert (drawn[:, :224] != drawn[:, 224:]).any()
    with pytest.raises(ValueError, match="the last block of this model attends in windows, not over the image"):
        draw(2)
