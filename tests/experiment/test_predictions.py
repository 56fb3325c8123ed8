"""Predictions on a split: every image once, its classes, and what is confused with what."""

import csv
import json
import pathlib

import numpy as np
import pytest
from helpers.runs import tiny

from halvit_jax.experiment.predictions import summary
from halvit_jax.main import run_experiment

Capsys = pytest.CaptureFixture[str]


def test_an_evaluation_writes_its_predictions_and_adds_itself_to_those_before(
    digits_dir: pathlib.Path, workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: Capsys
) -> None:
    config = tiny(digits_dir, **{"loop.eval_every": 8})
    curves = set(workdir.glob("events.*"))
    file = tmp_path / "test.csv"
    result = run_experiment(config, workdir, mode="eval", step="best", predictions=str(file))
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert list(rows[0]) == ["image", "label", "prediction", "probability", "probability_of_label"]
    assert len({row["image"] for row in rows}) == 364
    right = np.mean([row["label"] == row["prediction"] for row in rows])
    assert right == pytest.approx(result["ema_eval"]["top1"])
    matrix = list(csv.reader((tmp_path / "test.confusion.csv").read_text().splitlines()))
    counts = np.array([row[1:] for row in matrix[1:]], int)
    assert matrix[0][1:] == [row[0] for row in matrix[1:]] == [str(i) for i in range(10)]
    assert (counts.sum(), counts.trace()) == (364, sum(row["label"] == row["prediction"] for row in rows))
    lines = capsys.readouterr().out.splitlines()
    assert f"364 predictions in {file}, the confusion matrix in {tmp_path}/test.confusion.csv" in lines
    assert json.loads(lines[-1]) == result

    assert set(workdir.glob("events.*")) == curves  # its point is no part of the run's curves
    config.data.eval_split = "train[:100]"
    run_experiment(config, workdir, mode="eval")
    saved = [json.loads(line) for line in (workdir / "evals.jsonl").read_text().splitlines()]
    assert [(row["step"], row["eval_split"]) for row in saved] == [(8, "test"), (8, "train[:100]")]
    assert saved[0]["eval"] == result["eval"]


def test_a_file_that_cannot_be_written_is_refused(
    digits_dir: pathlib.Path, workdir: pathlib.Path, capsys: Capsys
) -> None:
    with pytest.raises(SystemExit):
        run_experiment(tiny(digits_dir), workdir, mode="eval", predictions="/not/there.csv")
    assert "--predictions=/not/there.csv cannot be written: No such file" in capsys.readouterr().err


def test_the_summary_names_the_worst_classes_and_what_they_were_taken_for() -> None:
    names = ["ant", "bee", "cat", "no image"]
    confusion = np.array([[9, 1, 0, 0], [2, 2, 0, 0], [0, 0, 10, 0], [0, 0, 0, 0]])
    assert summary(confusion, names) == [
        " 50.00% of 4 bee",
        " 90.00% of 10 ant",
        "100.00% of 10 cat",
        " 80.00% balanced accuracy, the mean over 3 classes",
        "2 times bee was taken for ant",
        "1 times ant was taken for bee",
    ]


def test_of_many_classes_only_the_worst_are_listed() -> None:
    lines = summary(np.eye(30, dtype=int), [f"class {i}" for i in range(30)])
    assert len(lines) == 22
    assert lines[20] == "and 10 more classes"
