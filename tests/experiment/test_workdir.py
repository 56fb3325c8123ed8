"""The files of a workdir."""

import json
import pathlib
from typing import Any

import pytest
from helpers.runs import tiny

from halvit_jax.cli import app
from halvit_jax.config import default_config
from halvit_jax.experiment import workdir as files
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


def test_the_result_of_a_run_that_is_trained_on_is_set_aside(tmp_path: pathlib.Path) -> None:
    files.set_aside_result(tmp_path, resumed_at=8)  # there is none
    (tmp_path / "result.json").write_text("{}")
    files.set_aside_result(tmp_path, resumed_at=8)
    assert [path.name for path in tmp_path.iterdir()] == ["result.step_8.json"]


def test_a_damaged_file_of_a_run_is_named(tmp_path: pathlib.Path) -> None:
    for name, read in (("config.json", files.read_config), ("dataset.json", files.read_dataset_info)):
        (tmp_path / name).write_text("{")
        with pytest.raises(ValueError, match=rf"{tmp_path}/{name} cannot be read: "):
            read(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    files.write_text(path, "old")
    monkeypatch.setattr(pathlib.Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    assert path.read_text() == "old"
