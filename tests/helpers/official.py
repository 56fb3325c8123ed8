"""Names, shapes and weights of the reference implementations, and the way through their names and back."""

import functools
import json
import pathlib
from typing import Any

import numpy as np

from halvit_jax.convert import from_torch, shapes_of, to_torch
from halvit_jax.models import create_model
from halvit_jax.trees import flatten, unflatten

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
Shapes = dict[str, tuple[int, ...]]


@functools.cache
def official_shapes(name: str) -> Shapes:
    """{name in the reference implementation: shape} of a model whose reference was run."""
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape in case["state"].items()}


def zeros(shapes: Shapes) -> dict[str, np.ndarray]:
    """Arrays of zeros that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def random_arrays(name: str, **fields: Any) -> dict[str, np.ndarray]:
    """{path: values no two of which are alike} of our model."""
    rng = np.random.default_rng(0)
    shapes = shapes_of(create_model(name, **fields))
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}


def state_of(arrays: dict[str, np.ndarray], name: str, **fields: Any) -> dict[str, np.ndarray]:
    """Our model's arrays under the official names."""
    return to_torch(name, unflatten(arrays), **fields)


def check_values_keep_their_places(name: str, **fields: Any) -> dict[str, np.ndarray]:
    """Under the official names and back every value is where it was; the state under the official names."""
    arrays = random_arrays(name, **fields)
    state = state_of(arrays, name, **fields)
    again = flatten(from_torch(name, state, **fields))
    assert again.keys() == arrays.keys()
    assert all(np.array_equal(again[path], array) for path, array in arrays.items())
    return state
