import pytest

from halvit_jax.text import MAX_CHARACTERS, first_few, one_line


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
