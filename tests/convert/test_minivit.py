"""Mini-DeiTs under their authors' names; Mini-Swins are with the Swins."""

import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.convert import from_torch, shapes_of, to_torch, torch_shapes
from halvit_jax.convert.engine import flatten, nest
from halvit_jax.models import create_model

Shapes = dict[str, tuple[int, ...]]
TINY = {"width": 32, "depth": 6, "num_heads": 2, "patch_size": 8, "image_size": 24, "num_classes": 5, "share": 3}


@pytest.fixture(scope="module")
def official(golden: pathlib.Path) -> Shapes:
    """The names and shapes of the reference implementation."""
    case = json.loads((golden / "mini_deit_tiny.json").read_text())
    return {key: tuple(shape) for key, shape in case["state"].items()}


def values(fields: dict[str, Any]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = shapes_of(create_model("mini_deit_tiny", **fields))
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}


def test_a_state_makes_the_round_trip_and_gives_the_references_logits(
    official: Shapes, golden: pathlib.Path, reference_weights: types.ModuleType
) -> None:
    state = {key: reference_weights.weights(key, shape) for key, shape in official.items()}
    model, variables = create_model("mini_deit_tiny"), from_torch("mini_deit_tiny", state)
    back = to_torch("mini_deit_tiny", variables)
    assert back.keys() == state.keys()
    for key, array in state.items():
        assert (back[key].dtype, back[key].shape) == (array.dtype, array.shape)
        assert back[key].tobytes() == array.tobytes()

    images = jnp.asarray(reference_weights.image(2, 224, 224).transpose(0, 2, 3, 1))
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    with np.load(golden / "mini_deit_tiny.npz") as file:
        reference = file["logits"]
    assert np.abs(logits - reference).max() / reference.std() <= 1e-4


@pytest.mark.parametrize(("size", "ratio"), [("tiny", 1), ("small", 2), ("base", 4)])
def test_all_sizes_have_the_names_of_their_authors(size: str, ratio: int, official: Shapes) -> None:
    # Widths and heads are multiples of three in the tiny model, and nothing else is, but for the three colours.
    wider = {key: tuple(n * ratio if n % 3 == 0 else n for n in shape) for key, shape in official.items()}
    wider["patch_embed.proj.weight"] = (192 * ratio, 3, 16, 16)
    assert torch_shapes(f"mini_deit_{size}") == wider


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share": 6, "pool": "token", "distilled": True},
        {"attention": "tied", "ffn": "tied", "attention_bias": False},
    ],
)
def test_values_keep_their_places(changes: dict[str, Any]) -> None:
    fields = TINY | changes
    arrays = values(fields)
    state = to_torch("mini_deit_tiny", nest(arrays), **fields)
    assert len(state) == len(arrays)
    again = flatten(from_torch("mini_deit_tiny", state, **fields))
    assert again.keys() == arrays.keys()
    assert all(np.array_equal(again[path], array) for path, array in arrays.items())


def test_no_deit_computes_what_a_mini_deit_does() -> None:
    with pytest.raises(
        ValueError, match="as_deit=True: mini_deit_tiny mixes its heads and has relative positions, whi"
    ):
        to_torch("mini_deit_tiny", nest(values(TINY)), as_deit=True, **TINY)
