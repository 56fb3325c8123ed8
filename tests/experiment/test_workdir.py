"""The files of a workdir."""

import json
import pathlib
from typing import Any

import pytest
from helpers.runs import tiny

from halvit_jax.cli import app
from halvit_jax.main import run_experiment


def test_result_and_description_are_written(finished: tuple[pathlib.Path, dict[str, Any]]) -> None:
    workdir, result = finished
    assert json.loads((workdir / "result.json").read_text()) == result
    assert json.loads((workdir / "dataset.json").read_text())["class_names"] == [str(i) for i in range(10)]
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 32


def test_an_unwritable_workdir_is_refused(
    digits_dir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as ended:
        run_experiment(tiny(digits_dir), tmp_path / "file" / "run")
    assert ended.value.code == app.ExitCode.BAD_INPUT
    assert "cannot be written to" in capsys.readouterr().err
