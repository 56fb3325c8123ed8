"""Configs by name, from any folder."""

import pathlib
import re
import runpy

import pytest
from helpers.processes import run_command

from halvit_jax import config as config_lib
from halvit_jax.cli import config_files


def test_a_config_is_found_by_its_name_its_file_name_and_its_path(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = config_files.FILES["halvit_digits"]
    for given in ("halvit_digits", "halvit_digits.py", "configs/halvit_digits.py", str(path)):
        assert config_files.resolve(given) == str(path)
    assert config_files.resolve("shvit:s4") == f"{config_files.FILES['shvit']}:s4"


def test_a_file_that_exists_comes_before_a_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pathlib.Path("halvit_digits").touch()
    assert config_files.resolve("halvit_digits:a") == "halvit_digits:a"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("halvit_digit:a", "did you mean --config=halvit_digits:a"),
        ("elsewhere/halvit_digits.py", "elsewhere/halvit_digits.py is neither"),
        ("halvit_digits.json", "halvit_digits.json is neither"),
        ("zzz", "the names are .*halvit_digits.*vit_digits"),
    ],
)
def test_an_unknown_config_is_refused_with_what_there_is(given: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config_files.resolve(given)


def test_the_value_of_the_flag_is_resolved_in_both_spellings_and_nothing_else() -> None:
    path = str(config_files.FILES["halvit_digits"])
    given = [
        "main",
        "--config=halvit_digits",
        "--config",
        "halvit_digits",
        "--workdir=a",
        "--config.seed=1",
    ]
    expected = ["main", f"--config={path}", "--config", path, "--workdir=a", "--config.seed=1"]
    assert config_files.resolve_flags(given) == expected


def test_the_config_of_a_run_is_read_from_its_workdir_or_its_config_json(tmp_path: pathlib.Path) -> None:
    config = config_lib.default_config()
    config.seed = 7
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    for given in (tmp_path, tmp_path / "config.json"):
        path, saved = config_files.resolve(str(given)).split(":")
        assert runpy.run_path(path)["get_config"](saved).seed == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c.optim.lr = 0.1", "own.py, line 4: AttributeError: .*lr"),
        ("import no_such_module", "own.py, line 4: ModuleNotFoundError: No module named 'no_such_module'"),
        ("c.batch_size = '64'", "TypeError: .*batch_size"),
        ("raise ValueError('variant a3 is not one of v1, a2')", "ValueError: variant a3 is not one of v1, a2"),
        (None, "AttributeError: .*get_config"),
    ],
)
def test_an_error_in_a_config_file_is_one_line_with_its_place(
    text: str | None, message: str, tmp_path: pathlib.Path
) -> None:
    lines = [
        "from halvit_jax.config import default_config",
        "def get_config():",
        "    c = default_config()",
        f"    {text}",
    ]
    (tmp_path / "own.py").write_text("" if text is None else "\n".join([*lines, "    return c"]))
    done = run_command("halvit_jax.main", f"--config={tmp_path}/own.py", f"--workdir={tmp_path}/run", code=2)
    (line,) = done.stderr.strip().splitlines()
    assert re.search(message, line)
