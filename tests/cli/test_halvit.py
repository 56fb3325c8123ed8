"""The console script: sub-commands, help and version."""

import importlib.util
import sys
import tomllib

import pytest
from helpers.pages import ROOT

from halvit_jax.cli import halvit
from halvit_jax.protocols import ExitCode

Capsys = pytest.CaptureFixture[str]


def test_every_sub_command_is_a_module_that_help_lists(capsys: Capsys) -> None:
    halvit.run(["--help"])
    printed = capsys.readouterr().out
    for name, (module, _, what) in halvit.COMMANDS.items():
        assert importlib.util.find_spec(module) is not None
        assert f"{name:<8} {what}" in printed


def test_the_version_is_that_of_pyproject(capsys: Capsys) -> None:
    halvit.run(["--version"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"halvit_jax {project['version']}\n"
    assert project["scripts"] == {"halvit": "halvit_jax.cli.halvit:run"}


def test_an_unknown_sub_command_is_refused_with_those_that_exist(capsys: Capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        halvit.run(["trian"])
    assert ended.value.code == ExitCode.BAD_INPUT
    assert "'trian' is not one of train, eval, predict" in capsys.readouterr().err


def test_a_sub_command_gets_its_own_arguments_and_the_given_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(halvit.runpy, "run_module", lambda module, **_: ran.append((module, sys.argv)))
    monkeypatch.setattr(sys, "argv", ["halvit", "eval", "--workdir=runs/a b"])
    halvit.run()
    assert ran == [("halvit_jax.main", ["halvit eval", "--mode=eval", "--workdir=runs/a b"])]
