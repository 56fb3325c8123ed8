"""Weights of one model initialise another: another classifier, resolution or number of input channels.

Arrays of the same path and shape are copied. The family's TRANSFER_RULES, (regular expression of a path, kind), allow
the rest; first match wins:

- "head": a classifier of another shape keeps its initial values; either model may lack it.
- "position_grid": positions are resampled to the new grid, as a key of RESAMPLINGS says; tokens before the grid (a
  class token) are kept.
- "input_channels": a kernel [k, k, c, f] for grey images (c = 1) is the sum over the old channels; in the other
  direction the grey kernel is divided evenly over the channels.

Shapes: `n` tokens, `d` width, `k` kernel side, `c` input channels, `f` features.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from halvit_jax.convert import arrays_from_torch, detectors, engine, readers, shapes_of, weights_file
from halvit_jax.layers.embed import resampled
from halvit_jax.models import transfer_rules
from halvit_jax.trees import TransferRules, flatten

MOST_BEFORE = 2  # tokens before a grid: those of class and distillation


class Transfer(NamedTuple):
    """Arrays by path that initialise a model, and a line for each that is not simply copied."""

    arrays: dict[str, np.ndarray]
    adapted: list[str]
    initialized: list[str]  # as in a new model
    unused: list[str]

    def lines(self) -> list[str]:
        """The log lines: the number of copied arrays, and the paths of all others."""
        rest = {"adapted": self.adapted, "initialized": self.initialized, "not used": self.unused}
        found = [f"{kind}: {', '.join(paths)}" for kind, paths in rest.items() if paths]
        return [f"{len(self.arrays) - len(self.adapted)} arrays copied", *found]


def read_for(path: str | os.PathLike[str], name: str, model: Any, *, ema: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a weight file under our paths: {"params/head/bias": array}.

    A PyTorch state is read with the names of `model`; it may differ from it as far as `transfer` allows. That of a
    detector may be a detector's or its backbone's.

    Raises:
        ValueError: an unreadable file, and every entry that is not an array of such a model, by name.
    """
    weights = readers.read(path, ema=ema)
    if weights_file.DETECTOR in weights.metadata and hasattr(model, "backbone"):
        return dict(weights.arrays)
    stored = weights_file.from_weights(weights)
    if stored is not None:
        return flatten(stored.variables)
    if hasattr(model, "backbone") and detectors.library_of(weights.arrays):
        wanted = detectors.shapes_of(model)
        free = {path for path in wanted if not path.split("/", 1)[1].startswith("backbone/")}
        return detectors.from_torch_arrays(name, model, weights.arrays, wanted, free=free)
    model = getattr(model, "backbone", model)
    wanted = shapes_of(model.clone(num_classes=model.num_classes or 1))  # the state may have a classifier
    free = {path for path in wanted if _kind(path, transfer_rules(model))}
    return arrays_from_torch(name, model, weights.arrays, wanted, free=free)


def below_backbone(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a backbone under the paths that they have in a detector; those of a detector as they are."""
    if any(_bare(path).startswith("backbone/") for path in arrays):
        return dict(arrays)
    return {"/backbone/".join(path.split("/", 1)): array for path, array in arrays.items()}


def transfer(
    name: str,
    arrays: Mapping[str, np.ndarray],
    wanted: engine.Shapes,
    rules: TransferRules,
    *,
    exclude: Sequence[str],
    positions: str = "timm",
) -> Transfer:
    """The part of `arrays` that initialises the model `name` of the shapes `wanted`.

    `exclude` are regular expressions of paths (without the collection before the first slash) that are not copied.

    Raises:
        ValueError: all missing or unexpected arrays and shape mismatches that no rule allows, by path; an expression of
            `exclude` without a match.
    """
    if positions not in RESAMPLINGS:
        raise ValueError(f"init_positions={positions!r} is not one of {', '.join(RESAMPLINGS)}")
    adapters = ADAPTERS | {"position_grid": functools.partial(adapt_position_grid, resampling=positions)}
    bare = [_bare(path) for path in wanted]
    for pattern in exclude:
        if not any(re.search(pattern, path) for path in bare):
            raise ValueError(f"init_exclude: {pattern!r} matches no path of {name}; a path is e.g. {bare[0]}")
    problems = engine.Problems(f"these weights cannot initialise {name}")
    found = Transfer({}, [], [], [])
    for path, shape in wanted.items():
        kind, array = _kind(path, rules), arrays.get(path)
        excluded = any(re.search(pattern, _bare(path)) for pattern in exclude)
        if excluded or (kind == "head" and (array is None or array.shape != shape)):
            found.initialized.append(f"{path} {shape}")
            if array is not None:
                found.unused.append(f"{path} {array.shape}")
        elif array is None:
            problems.add("missing", path)
        elif array.shape == shape:
            found.arrays[path] = np.asarray(array, np.float32)
        else:
            adapted = adapters[kind](array, shape) if kind in adapters else None
            if adapted is None:
                problems.add("shape mismatch", f"{path} (is {array.shape}, must be {shape})")
            else:
                found.arrays[path] = adapted
                found.adapted.append(f"{path} {array.shape} -> {shape}")
    for path in arrays.keys() - wanted.keys():
        if _kind(path, rules) == "head":
            found.unused.append(f"{path} {arrays[path].shape}")
        else:
            problems.add("unexpected", path)
    problems.raise_any()
    return found


def adapt_position_grid(array: np.ndarray, shape: tuple[int, ...], *, resampling: str = "timm") -> np.ndarray | None:
    """Resample positions [n, d] of a square grid, after those of other tokens, to a grid of another size.

    `resampling` is a key of RESAMPLINGS.
    """
    for before in range(min(MOST_BEFORE + 1, len(array), shape[0])):
        old, new = math.isqrt(len(array) - before), math.isqrt(shape[0] - before)
        if old**2 + before == len(array) and new**2 + before == shape[0]:
            break
    else:
        return None
    if array.shape[1] != shape[1]:
        return None
    table = np.asarray(array, np.float32)
    grid = RESAMPLINGS[resampling](table[before:].reshape(old, old, -1), new)
    return np.concatenate([table[:before], grid.reshape(new * new, -1)])


def timm_bicubic(grid: np.ndarray, side: int) -> np.ndarray:
    """A map [u, u, d] resampled to [side, side, d] as timm does: bicubic (a = -0.5), antialiased where it shrinks."""
    u, _, d = grid.shape
    return np.asarray(resampled(grid.reshape(u * u, d), (u, u), (side, side))).reshape(side, side, d)


def torch_bicubic(grid: np.ndarray, side: int) -> np.ndarray:
    """A map [u, u, d] resampled to [side, side, d] as `torch.nn.functional.interpolate(mode="bicubic")` does.

    DeiT, MiniViT and Swin resample with it. Its kernel has a = -0.75, its edges are repeated, nothing is antialiased.
    """
    u, a = grid.shape[0], -0.75
    place = (np.arange(side) + 0.5) * (u / side) - 0.5
    first = np.floor(place).astype(int)
    weights = np.zeros((side, u))
    for tap in range(-1, 3):
        x = np.abs(place - first - tap)
        near = ((a + 2) * x - (a + 3)) * x * x + 1  # x <= 1
        far = ((x - 5) * x + 8) * x * a - 4 * a  # 1 < x < 2
        np.add.at(weights, (np.arange(side), np.clip(first + tap, 0, u - 1)), np.where(x <= 1, near, far))
    return np.einsum("iu,jv,uvd->ijd", weights, weights, grid).astype(np.float32)


RESAMPLINGS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"timm": timm_bicubic, "torch": torch_bicubic}


def adapt_input_channels(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A kernel [k, k, c, f] for another number of colours; the old or the new one is grey."""
    same = array.ndim == 4 and (array.shape[:2], array.shape[3]) == (shape[:2], shape[3])
    if not same or 1 not in (array.shape[2], shape[2]):
        return None
    grey = np.asarray(array, np.float32).sum(2, keepdims=True)
    return np.repeat(grey / shape[2], shape[2], 2)


ADAPTERS: dict[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray | None]] = {
    "position_grid": adapt_position_grid,
    "input_channels": adapt_input_channels,
}


def _kind(path: str, rules: TransferRules) -> str:
    return next((kind for pattern, kind in rules if re.search(pattern, _bare(path))), "")


def _bare(path: str) -> str:
    return path.split("/", 1)[-1]
