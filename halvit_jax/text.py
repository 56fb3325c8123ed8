"""Lines of text for messages: the first few of many names, an error on one line."""

from collections.abc import Sequence

MAX_NAMES = 5
MAX_CHARACTERS = 300
CUT = " ... "


def first_few(names: Sequence[str], most: int = MAX_NAMES) -> str:
    """The first names, joined by commas, and the number of the rest: "a, b and 3 more"."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def one_line(error: object) -> str:
    """The text of an error without line breaks; of one longer than `MAX_CHARACTERS` the start and the end.

    The end, because libraries put the cause last.
    """
    text = " ".join(str(error).split())
    half = (MAX_CHARACTERS - len(CUT)) // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]}{CUT}{text[-half:]}"
