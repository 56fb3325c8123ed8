"""Lines of text for messages: the first few of many names, an error on one line."""

from collections.abc import Sequence

MAX_NAMES = 5
MAX_CHARACTERS = 300


def first_few(names: Sequence[str], most: int = MAX_NAMES) -> str:
    """The first names, joined by commas, and the number of the rest: "a, b and 3 more"."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def one_line(error: object) -> str:
    """The text of an error without line breaks, cut off after `MAX_CHARACTERS`."""
    return " ".join(str(error).split())[:MAX_CHARACTERS]
