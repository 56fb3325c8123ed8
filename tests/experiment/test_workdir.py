"""The files of a workdir."""

import json
import pathlib
from typing import Any

import pytest
from helpers.runs import tiny

from halvit_jax.cli import app
from halvit_jax.config import default_config
from halvit_jax.experiment.workdir import read_dataset_info, write_run_metadata
from halvit_jax.main import run_experiment
from halvit_jax.protocols import DatasetInfo


def test_result_and_description_are_written(finished: tuple[pathlib.Path, dict[str, Any]]) -> None:
    workdir, result = finished
    assert json.loads((workdir / "result.json").read_text()) == result
    assert json.loads((workdir / "dataset.json").read_text())["class_names"] == [str(i) for i in range(10)]
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 32


def test_the_categories_of_a_detector_are_listed_by_label(tmp_path: pathlib.Path) -> None:
    info = DatasetInfo(["cat", "dog"], 5, "coco", {"category_ids": [3, 90]})
    write_run_metadata(tmp_path, default_config(), info)
    listed = json.loads((tmp_path / "categories.json").read_text())
    assert listed == [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}]
    assert read_dataset_info(tmp_path) == info


def test_an_unwritable_workdir_is_refused(
    digits_dir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as ended:
        run_experiment(tiny(digits_dir), tmp_path / "file" / "run")
    assert ended.value.code == app.ExitCode.BAD_INPUT
    assert "cannot be written to" in capsys.readouterr().err
