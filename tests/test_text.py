import tomllib

import pytest
from helpers.processes import ROOT

from halvit_jax.text import EXTRAS, MAX_CHARACTERS, first_few, one_line, pip_install


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [
        (0, 5, ""),
        (1, 5, "0"),
        (5, 5, "0, 1, 2, 3, 4"),
        (7, 5, "0, 1, 2, 3, 4 and 2 more"),
        (1002, 1, "0 and 1,001 more"),
    ],
)
def test_first_few_names_and_the_number_of_the_rest(count: int, most: int, expected: str) -> None:
    assert first_few([str(number) for number in range(count)], most) == expected


def test_one_line_joins_lines_and_is_cut_off() -> None:
    assert one_line(ValueError("no space left\n  on  device\n")) == "no space left on device"
    assert one_line(ValueError()) == ""
    long = one_line("head " + "word " * 1000 + "No space left on device")
    assert MAX_CHARACTERS - 1 <= len(long) <= MAX_CHARACTERS
    assert long.startswith("head word")
    assert long.endswith("No space left on device")


def test_the_command_that_installs_an_extra_names_its_packages_as_pyproject_does() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: tuple(extras[name]) for name in EXTRAS} == EXTRAS
    assert pip_install("onnx", "pillow") == "pip install 'jax2onnx>=0.17' onnxruntime pillow"
