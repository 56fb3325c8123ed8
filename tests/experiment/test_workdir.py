"""The files of a workdir."""

import json
import pathlib
from typing import Any

import pytest
from helpers.gcs_server import Server
from helpers.runs import tiny

from halvit_jax import storage
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


def test_a_workdir_in_a_bucket_is_tested_leaves_nothing_there_and_is_refused_without_access(server: Server) -> None:
    workdir = storage.parse(f"{server.url}/run")
    files.create_workdir(workdir)
    assert server.bucket.names() == []
    server.bucket.forbidden = ("POST",)
    with pytest.raises(ValueError, match=r"--workdir=gs://bucket/run cannot be written to \(.*403.*\); name"):
        files.create_workdir(workdir)


def test_a_config_that_was_another_one_is_kept_in_a_bucket_too(server: Server) -> None:
    workdir, info = storage.parse(f"{server.url}/run"), DatasetInfo(["cat", "dog"], 2)
    config = default_config()
    files.write_run_metadata(workdir, config, info)
    before, config.seed = server.bucket.text("run/config.json"), 7
    files.write_run_metadata(workdir, config, info, resumed_at=8)
    assert server.bucket.text("run/config.step_8.json") == before
    assert files.read_config(workdir).seed == 7
    assert files.read_dataset_info(workdir) == info
    files.append_evaluation(workdir, {"step": 8})
    files.append_evaluation(workdir, {"step": 9})
    assert (workdir / files.EVALS_FILE).read_text() == '{"step": 8}\n{"step": 9}\n'
    assert files.directory_size(workdir) == sum(len(each.data) for each in server.bucket.objects.values())
    assert files.split_source("gs://bucket/run@best") == ("gs://bucket/run", "best")
    assert files.split_source("hf://me/model@main") == ("hf://me/model@main", None)


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
    storage.write_text(path, "old")
    monkeypatch.setattr(pathlib.Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        storage.write_text(path, "new")
    assert path.read_text() == "old"
