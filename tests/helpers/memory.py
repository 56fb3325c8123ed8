"""Memory that a call holds."""

import contextlib
import tracemalloc
from typing import Any


def peak(function: Any, *arguments: Any) -> int:
    """The most memory, in bytes, that was held at once, beside what was held before."""
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
