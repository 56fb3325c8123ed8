"""Weights that begin another model than the one they are of: another classifier, resolution or number of colours.

What has the same path and shape is taken as it is. The rest is up to the family's TRANSFER_RULES, (regular expression
of a path, what may be done about it), first match wins:

- "head": another number of classes begins fresh, and a classifier that only one of the two has is no mistake.
- "grid": positions of tokens are resampled to the new grid as timm does: bicubic and antialiased, tokens that stand
  before the grid (a class token) kept.
- "colours": a kernel [k, k, c, f] over grey images (c = 1) sums that over the old colours; the other way round the grey
  one is spread evenly.

Shapes: `n` tokens, `d` width, `k` kernel side, `c` colours, `f` features.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from halvit_jax.convert import engine, readers, rules_of, shapes_of, weights_file
from halvit_jax.models import transfer_rules
from halvit_jax.trees import TransferRules, flatten

MOST_BEFORE = 2  # tokens before a grid: those of class and distillation


class Transfer(NamedTuple):
    """Arrays by path to begin a model with, and what became of all others, one line each."""

    arrays: dict[str, np.ndarray]
    changed: list[str]
    fresh: list[str]
    unused: list[str]

    def lines(self) -> list[str]:
        """What to tell: the count of what was taken as it is, and all that was not."""
        rest = {"changed": self.changed, "begins fresh": self.fresh, "not used": self.unused}
        found = [f"{kind}: {', '.join(paths)}" for kind, paths in rest.items() if paths]
        return [f"{len(self.arrays) - len(self.changed)} arrays as they are", *found]


def read_for(path: str | os.PathLike[str], name: str, model: Any) -> dict[str, np.ndarray]:
    """The arrays of a weight file under our paths: {"params/head/bias": array}.

    A PyTorch state is read with the names of `model`, from which it may differ in what `transfer` allows.

    Raises:
        ValueError: what reading refuses, and every entry that is no array of such a model, by name.
    """
    weights = readers.read(path)
    known = weights_file.from_weights(weights)
    if known is not None:
        return flatten(known.variables)
    wanted = shapes_of(model.clone(num_classes=model.num_classes or 1))  # the state may have a classifier
    free = {path for path in wanted if _kind(path, transfer_rules(model))}
    return engine.to_ours(name, rules_of(name, model), weights.arrays, wanted, free=free)


def transfer(
    name: str, arrays: Mapping[str, np.ndarray], wanted: engine.Shapes, rules: TransferRules, *, fresh: Sequence[str]
) -> Transfer:
    """What of `arrays` the model `name` of the shapes `wanted` can begin with.

    `fresh` are regular expressions of paths (without the collection before the first slash) that are not taken over.

    Raises:
        ValueError: all that no rule allows: missing, left-over and misshapen arrays by path; an expression of `fresh`
            that no path has.
    """
    bare = [_bare(path) for path in wanted]
    for pattern in fresh:
        if not any(re.search(pattern, path) for path in bare):
            raise ValueError(f"init_exclude holds {pattern!r}, which is in no path of {name}; they are like {bare[0]}")
    problems = engine.Problems(f"these weights cannot begin {name}")
    found = Transfer({}, [], [], [])
    for path, shape in wanted.items():
        kind, array = _kind(path, rules), arrays.get(path)
        left_out = any(re.search(pattern, _bare(path)) for pattern in fresh)
        if left_out or (kind == "head" and (array is None or array.shape != shape)):
            found.fresh.append(f"{path} {shape}")
            if array is not None:
                found.unused.append(f"{path} {array.shape}")
        elif array is None:
            problems.add("missing", path)
        elif array.shape == shape:
            found.arrays[path] = np.asarray(array, np.float32)
        else:
            changed = CHANGES[kind](array, shape) if kind in CHANGES else None
            if changed is None:
                problems.add("misshapen", f"{path} (is {array.shape}, must be {shape})")
            else:
                found.arrays[path] = changed
                found.changed.append(f"{path} {array.shape} -> {shape}")
    for path in arrays.keys() - wanted.keys():
        if _kind(path, rules) == "head":
            found.unused.append(f"{path} {arrays[path].shape}")
        else:
            problems.add("left over", path)
    problems.raise_any()
    return found


def resample_grid(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Positions [n, d] of a square grid, after those of some other tokens, for a grid of another size."""
    for before in range(min(MOST_BEFORE + 1, len(array), shape[0])):
        old, new = math.isqrt(len(array) - before), math.isqrt(shape[0] - before)
        if old**2 + before == len(array) and new**2 + before == shape[0]:
            break
    else:
        return None
    if array.shape[1] != shape[1]:
        return None
    grid = np.asarray(array[before:], np.float32).reshape(old, old, -1)
    grid = np.asarray(jax.image.resize(grid, (new, new, shape[1]), "bicubic", antialias=True))
    return np.concatenate([np.asarray(array[:before], np.float32), grid.reshape(new**2, -1)])


def change_colours(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A kernel [k, k, c, f] for images of another number of colours, one of the two being grey."""
    same = array.ndim == 4 and (array.shape[:2], array.shape[3]) == (shape[:2], shape[3])
    if not same or 1 not in (array.shape[2], shape[2]):
        return None
    grey = np.asarray(array, np.float32).sum(2, keepdims=True)
    return np.repeat(grey / shape[2], shape[2], 2)


CHANGES: dict[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray | None]] = {
    "grid": resample_grid,
    "colours": change_colours,
}


def _kind(path: str, rules: TransferRules) -> str:
    return next((kind for pattern, kind in rules if re.search(pattern, _bare(path))), "")


def _bare(path: str) -> str:
    return path.split("/", 1)[-1]
