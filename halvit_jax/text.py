"""Lines of text for messages: the first few of many names, an error on one line, the command that installs an extra."""

import shlex
from collections.abc import Sequence

MAX_NAMES = 5
MAX_CHARACTERS = 300
CUT = " ... "
EXTRAS = {  # the packages of the extras of pyproject.toml that a program asks for
    "detection": ("pycocotools>=2.0.8",),
    "hub": ("huggingface_hub>=0.30",),
    "onnx": ("jax2onnx>=0.17", "onnxruntime"),
    "plot": ("matplotlib",),
    "torch": ("torch",),
    "tpu": ("jax[tpu]",),
}


def pip_install(*packages: str) -> str:
    """The command that installs these packages, or those of an extra, which is known by the key of `EXTRAS`.

    It names them one by one: `halvit_jax[onnx]` works only where this package comes from an index.
    """
    return shlex.join(["pip", "install", *(name for each in packages for name in EXTRAS.get(each, (each,)))])


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
