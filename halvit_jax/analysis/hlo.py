"""Memory, traffic and collectives of a compiled program, read from XLA."""

import math
import re
from typing import Any

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({KINDS})(-start)?\(", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%[\w.-]+) = (\(.*?\)|\S+) ([a-z-]+)\((.*?)\)(?=,|$)(.*)$")
_CALLED = re.compile(r"(?:body|condition|true_computation|false_computation)=(%[\w.-]+)|branch_computations={([^}]*)}")
_PLACED = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:{([^}]*)})?")
_MOVES_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
_STARTS = {"copy-start": 0, "slice-start": 1}  # the result holds the operand too, and the new array at this place
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


def hbm_bytes(hlo: str) -> int:
    """Bytes of operands and results that lie in HBM, summed over the instructions of a compiled module's text.

    XLA's own "bytes accessed" counts every operand, also those that the compiler keeps in VMEM, and for a fusion also
    what it reads inside. Here the layout tells: another memory space than HBM is written S(1), S(2), ... in it. A loop
    and the branches of a condition count once; arrays count without the padding of their layout.
    """
    computations = _computations(hlo)
    waiting, seen, total = [name for name in computations if name.startswith("ENTRY")], set(), 0
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        found = [match for line in computations.get(name, ()) if (match := _INSTRUCTION.match(line))]
        shapes = {match[1]: match[2] for match in found}
        for _, shape, kind, operands, rest in (match.groups() for match in found):
            for one, several in _CALLED.findall(rest):
                waiting += re.findall(r"%[\w.-]+", one or several)
            if kind in _MOVES_NOTHING or kind.endswith("-done"):
                continue
            read = sum(_in_hbm(shapes.get(operand, "")) for operand in re.findall(r"%[\w.-]+", operands))
            written = _in_hbm(shape)
            if kind in _STARTS:
                new = list(_PLACED.finditer(shape))[_STARTS[kind]]
                written = _in_hbm(new[0])
                read = min(read, _array_bytes(new[1], new[2]))
            total += read + written
    return total


def bytes_named(message: str) -> int | None:
    """The needed bytes in the compiler's message, or None.

    The message is "HLO temporaries (16.13G) exceeds ...", but its number includes arguments and outputs.
    """
    match = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message)
    return None if match is None else int(float(match[1]) * 2 ** (10 * " KMGT".index(match[2] or " ")))


def _computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation by its name; that of the program begins with "ENTRY"."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if match := re.match(r"(ENTRY )?(%[\w.-]+) .*{$", line):
            lines = found.setdefault((match[1] or "") + match[2], [])
        else:
            lines.append(line)
    return found


def _in_hbm(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in HBM."""
    placed = _PLACED.findall(shape)
    return sum(_array_bytes(dtype, sizes) for dtype, sizes, layout in placed if not re.search(r"S\([1-9]", layout))


def _array_bytes(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])  # the first number of bf16, s32, f8e4m3fn
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
