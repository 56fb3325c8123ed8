"""Memory and collectives of a compiled program, read from XLA."""

import math
import re
from typing import Any

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({KINDS})(-start)?\(", re.MULTILINE)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes on a device: "arguments", "temporaries", "output" and "code". Donated buffers count as arguments."""
    found = compiled.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "output": found.output_size_in_bytes - found.alias_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} of a compiled module's text; bytes are those of the results on one device.

    Each instruction counts once, also in a loop (`accumulate`) or in a branch that may not be taken. An all-reduce that
    a TPU fuses with a slice of its result is still listed as an all-reduce.
    """
    found: dict[str, dict[str, int]] = {}
    for shape, kind, start in _COLLECTIVE.findall(hlo):
        arrays = [_array_bytes(*array) for array in _ARRAY.findall(re.sub(r"u32\[\](?:{[^}]*})?", "", shape))]
        if start and kind != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]  # the operands come first
        row = found.setdefault(kind, {"count": 0, "bytes": 0})
        row["count"] += 1
        row["bytes"] += sum(arrays)
    return dict(sorted(found.items()))


def bytes_named(message: str) -> int | None:
    """The needed bytes in the compiler's message, or None.

    The message is "HLO temporaries (16.13G) exceeds ...", but its number includes arguments and outputs.
    """
    match = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message)
    return None if match is None else int(float(match[1]) * 2 ** (10 * " KMGT".index(match[2] or " ")))


def _array_bytes(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])  # the first number of bf16, s32, f8e4m3fn
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
