"""Configs by name, from any folder."""

import pathlib

import pytest

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
