"""Ordered rules between PyTorch's names and layouts and ours. One table serves both directions.

A state is {PyTorch's name: array}; a tree is flat here: {"params/block0/attention/qkv/kernel": array}. Results are
views of the inputs: no function copies an array.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from halvit_jax.text import first_few

Shapes = Mapping[str, tuple[int, ...]]


def _behind_zeros(array: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([np.zeros((rows, *array.shape[1:]), array.dtype), array])


class Layout(NamedTuple):
    """The layout of an array here and in PyTorch; each function undoes the other."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


# PyTorch on the left: `o` out, `i` in, `h w` space, `n` tokens, `d` width.
LAYOUTS: dict[str, Layout] = {
    "same": Layout(lambda a: a, lambda a: a),
    "linear": Layout(lambda a: a.T, lambda a: a.T),  # [o, i] -> [i, o]
    # [o, i, h, w] -> [h, w, i, o]
    "conv": Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    "pointwise": Layout(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]),  # [o, i, 1, 1] -> [i, o]
    "token": Layout(lambda a: a[0, 0], lambda a: a[None, None]),  # [1, 1, d] -> [d]
    "position": Layout(lambda a: a[0], lambda a: a[None]),  # [1, n, d] -> [n, d]
    # Detectors: [o, i 7 7] -> [7 7 i, o], of features pooled to 7 x 7; a transposed convolution [i, o, h, w] -> [h, w,
    # i, o]; and what torchvision has of a class 0, the background, which is the last one here, or has no box and mask.
    "pooled": Layout(
        lambda a: a.reshape(len(a), -1, 7, 7).transpose(2, 3, 1, 0).reshape(-1, len(a)),
        lambda a: a.reshape(7, 7, -1, a.shape[1]).transpose(3, 2, 0, 1).reshape(a.shape[1], -1),
    ),
    "transposed": Layout(lambda a: a.transpose(2, 3, 0, 1), lambda a: a.transpose(2, 3, 0, 1)),
    "background_first": Layout(lambda a: np.roll(a, -1, 0).T, lambda a: np.roll(a.T, 1, 0)),
    "background_first_bias": Layout(lambda a: np.roll(a, -1), lambda a: np.roll(a, 1)),
    "background_boxes": Layout(lambda a: a[4:].T, lambda a: _behind_zeros(a.T, 4)),
    "background_boxes_bias": Layout(lambda a: a[4:], lambda a: _behind_zeros(a, 4)),
    "background_masks": Layout(
        lambda a: a[1:].transpose(2, 3, 1, 0), lambda a: _behind_zeros(a.transpose(3, 2, 0, 1), 1)
    ),
    "background_masks_bias": Layout(lambda a: a[1:], lambda a: _behind_zeros(a, 1)),
}
# PyTorch's buffers, which are not kept. A counter of updates is ignored when read and 0 when written. A cache that
# follows from the fields, such as indices, is ignored when read and not written.
COUNTER, CACHE = "counter", "cache"
BUFFERS = (COUNTER, CACHE)
MAX_LISTED = 10  # entries of one kind in a message
FLOATS = ("float32", "float16", "bfloat16")  # exact in float32


@dataclasses.dataclass(frozen=True)
class Rule:
    """`source`, a PyTorch name, and `target`, a path of ours, name the same array.

    `{i}` is a number, the same one on both sides, so a rule reads both ways. Of several rules for one path, the first
    is written and all are read. A rule of the layouts "counter" and "cache" names a buffer that PyTorch stores beside
    the array of `target`.

    Raises:
        ValueError: a layout that is not in LAYOUTS, or a number on only one side.
    """

    source: str
    target: str
    layout: str = "same"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS and self.layout not in BUFFERS:
            allowed = ", ".join((*LAYOUTS, *BUFFERS))
            raise ValueError(f"layout {self.layout!r} of {self.source} is not one of {allowed}")
        if _numbers(self.source) != _numbers(self.target):
            raise ValueError(f"{self.source} and {self.target} do not name the same numbers; rules read both ways")

    def path(self, name: str) -> str | None:
        """The path of the array with this PyTorch name; None if the rule does not match."""
        return _translate(name, self.source, self.target)

    def name(self, path: str) -> str | None:
        """PyTorch's name of the array at `path`; None if the rule does not match."""
        return _translate(path, self.target, self.source)


def dense(source: str, target: str) -> tuple[Rule, ...]:
    """A linear layer."""
    return Rule(f"{source}.weight", f"params/{target}/kernel", "linear"), _bias(source, target)


def conv(source: str, target: str) -> tuple[Rule, ...]:
    """A convolution."""
    return Rule(f"{source}.weight", f"params/{target}/kernel", "conv"), _bias(source, target)


def layer_norm(source: str, target: str) -> tuple[Rule, ...]:
    """A normalisation without statistics."""
    return Rule(f"{source}.weight", f"params/{target}/scale"), _bias(source, target)


def batch_norm(source: str, target: str) -> tuple[Rule, ...]:
    """A batch normalisation and its statistics."""
    return (
        *layer_norm(source, target),
        Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
        Rule(f"{source}.running_var", f"batch_stats/{target}/var"),
        Rule(f"{source}.num_batches_tracked", f"batch_stats/{target}/mean", COUNTER),
    )


def from_torch_arrays(
    model: str, rules: Sequence[Rule], state: Mapping[str, Any], wanted: Shapes, *, free: Set[str] = frozenset()
) -> dict[str, np.ndarray]:
    """The arrays of a PyTorch state under our paths and in our layouts.

    Counters and caches may be missing, because not all files have them. Arrays at the paths of `free` may be missing
    too, and may have other sizes.

    Raises:
        ValueError: every ambiguous, missing or unexpected entry, shape mismatch and wrong type, by name.
    """
    problems = Problems(f"these weights do not fit {model}")
    arrays: dict[str, np.ndarray] = {}
    names: dict[str, list[str]] = {path: [] for path in wanted}
    for name, value in state.items():
        places = [(rule, path) for rule in rules if (path := rule.path(name)) is not None and path in wanted]
        if not places:
            problems.add("unexpected", name)
            continue
        if len(places) > 1:
            problems.add("ambiguous", f"{name} (is {' and '.join(path for _, path in places)})")
        rule, path = places[0]
        if rule.layout in BUFFERS:
            continue
        names[path].append(name)
        array, shape = np.asarray(value), torch_shape(rule, wanted[path])
        if array.shape != shape and not (path in free and array.ndim == len(shape)):
            problems.add("shape mismatch", f"{name} (is {array.shape}, must be {shape})")
        elif array.dtype.name not in FLOATS:
            problems.add("of a wrong type", f"{name} (is {array.dtype.name}, must be {' or '.join(FLOATS)})")
        else:
            arrays[path] = LAYOUTS[rule.layout].to_jax(array)
    for path, found in names.items():
        if len(found) > 1:
            problems.add("ambiguous", f"{path} (is {' and '.join(found)})")
        if not found and path not in free:
            problems.add("missing", first_name(rules, path) or f"{path} (no rule names it)")
    problems.raise_any()
    return arrays


def to_torch(rules: Sequence[Rule], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays at our paths under PyTorch's names and in its layouts; counters are 0.

    Raises:
        ValueError: every path without a rule, and every name of two paths.
    """
    problems = Problems("the table of names does not fit this model")
    state: dict[str, np.ndarray] = {}
    for path, array in arrays.items():
        carrier = next((rule for rule in rules if rule.layout not in BUFFERS and rule.name(path)), None)
        if carrier is None:
            problems.add("missing", f"{path} (no rule names it)")
            continue
        entries = {str(carrier.name(path)): LAYOUTS[carrier.layout].to_torch(array)}
        counter = next((name for rule in rules if rule.layout == COUNTER and (name := rule.name(path))), None)
        if counter:
            entries[counter] = np.zeros((), np.int64)
        for name in entries.keys() & state.keys():
            problems.add("ambiguous", f"{name} (is {path} and another)")
        state |= entries
    problems.raise_any()
    return state


def check_tree(model: str, arrays: Mapping[str, np.ndarray], wanted: Shapes) -> None:
    """Raise a ValueError that lists every missing or unexpected array, shape mismatch and wrong type, by path."""
    problems = Problems(f"these variables do not fit {model}")
    for path, array in arrays.items():
        if path not in wanted:
            problems.add("unexpected", path)
        elif array.shape != wanted[path]:
            problems.add("shape mismatch", f"{path} (is {array.shape}, must be {wanted[path]})")
        elif array.dtype.name not in FLOATS:
            problems.add("of a wrong type", f"{path} (is {array.dtype.name}, must be {' or '.join(FLOATS)})")
    for path in wanted:
        if path not in arrays:
            problems.add("missing", path)
    problems.raise_any()


def torch_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """PyTorch's shape of an array that has this shape here."""
    return LAYOUTS[rule.layout].to_torch(np.broadcast_to(np.float32(0), shape)).shape


def first_name(rules: Sequence[Rule], path: str) -> str | None:
    """PyTorch's name of the array at this path."""
    return next((name for rule in rules if rule.layout not in BUFFERS and (name := rule.name(path))), None)


class Problems:
    """Collects problems, to raise all at once."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._found: dict[str, list[str]] = {}

    def add(self, kind: str, entry: str) -> None:
        """Add an entry of this kind."""
        self._found.setdefault(kind, []).append(entry)

    def raise_any(self) -> None:
        """Raise a ValueError that counts all entries and lists the first of each kind, if there are any."""
        if self._found:
            kinds = [f"{len(found)} {kind}: {first_few(found, MAX_LISTED)}" for kind, found in self._found.items()]
            raise ValueError(f"{self._what}; {'; '.join(kinds)}")


def _bias(source: str, target: str) -> Rule:
    return Rule(f"{source}.bias", f"params/{target}/bias")


def _translate(text: str, given: str, wanted: str) -> str | None:
    found = _pattern(given).fullmatch(text)
    return wanted.format(**found.groupdict()) if found else None


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]+)", re.escape(template)))


def _numbers(template: str) -> list[str]:
    return sorted(re.findall(r"{(\w+)}", template))
