"""Pyramid Vision Transformers under their authors' names."""

import json
import pathlib
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.convert import from_torch, shapes_of, to_torch, torch_shapes
from halvit_jax.convert.engine import flatten, nest
from halvit_jax.convert.transfer import transfer
from halvit_jax.layers import conv
from halvit_jax.models import create_model, transfer_rules

Shapes = dict[str, tuple[int, ...]]
SMALL = {
    "strides": (4, 2),
    "widths": (16, 24),
    "depths": (2, 1),
    "head_width": 8,
    "ffn_ratios": (2, 2),
    "reductions": (2, 1),
    "image_size": 32,
    "num_classes": 5,
}


@pytest.fixture(scope="module")
def official(golden: pathlib.Path) -> dict[str, Shapes]:
    """The names and shapes of the reference implementations."""
    cases = {name: json.loads((golden / f"{name}.json").read_text()) for name in ("pvt_tiny", "pvt_v2_b0")}
    return {name: {key: tuple(shape) for key, shape in case["state"].items()} for name, case in cases.items()}


@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b0"])
def test_a_state_makes_the_round_trip_and_gives_the_references_logits(
    name: str, official: dict[str, Shapes], golden: pathlib.Path, reference_weights: types.ModuleType
) -> None:
    state = {key: reference_weights.weights(key, shape) for key, shape in official[name].items()}
    model, variables = create_model(name), from_torch(name, state)
    back = to_torch(name, variables)
    assert back.keys() == state.keys()
    for key, array in state.items():
        assert (back[key].dtype, back[key].shape) == (array.dtype, array.shape)
        assert back[key].tobytes() == array.tobytes()

    images = jnp.asarray(reference_weights.image(2, 224, 224).transpose(0, 2, 3, 1))
    with conv.native():  # quicker to compile
        logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    with np.load(golden / f"{name}.npz") as file:
        reference = file["logits"]
    assert np.abs(logits - reference).max() / reference.std() <= 1e-4


def shallow(shapes: Shapes) -> Shapes:
    """The state of a model with one block in each stage."""
    return {key: shape for key, shape in shapes.items() if not re.match(r"block\d\.[1-9]", key)}


def wider(b0: Shapes) -> Shapes:
    """PVTv2-B1 is twice as wide as B0; nothing but widths is a multiple of 32."""
    return {key: tuple(2 * n if n % 32 == 0 else n for n in shape) for key, shape in b0.items()}


def linear(b1: Shapes) -> Shapes:
    """Where others reduce, a linear one has a convolution of 1x1, and that in its last stage too."""
    shapes = {key: (*shape[:2], 1, 1) if key.endswith("sr.weight") else shape for key, shape in b1.items()}
    for key, shape in list(shapes.items()):
        if re.match(r"block3\.0\.attn\.(sr|norm)", key):
            shapes[key.replace("block3", "block4")] = tuple(512 if n == 320 else n for n in shape)
    return shapes


def test_other_sizes_have_the_names_of_their_authors(official: dict[str, Shapes]) -> None:
    """The number of blocks is held by the counts of parameters."""
    b1 = shallow(wider(official["pvt_v2_b0"]))
    expected = {"pvt_large": shallow(official["pvt_tiny"]), "pvt_v2_b4": b1, "pvt_v2_b2_li": linear(b1)}
    for name, shapes in expected.items():
        assert torch_shapes(name, depths=(1, 1, 1, 1)) == shapes, name


@pytest.mark.parametrize(("name", "entry"), [("pvt_tiny", "cls_token"), ("pvt_v2_b2_li", "norm2.bias")])
def test_values_keep_their_places(name: str, entry: str) -> None:
    shapes = shapes_of(create_model(name, **SMALL))
    rng = np.random.default_rng(0)
    arrays = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    state = to_torch(name, nest(arrays), **SMALL)
    assert len(state) == len(arrays)
    assert entry in state
    again = flatten(from_torch(name, state, **SMALL))
    assert again.keys() == arrays.keys()
    assert all(np.array_equal(again[path], array) for path, array in arrays.items())
    with pytest.raises(ValueError, match=f"1 missing: {entry}$"):
        from_torch(name, {key: array for key, array in state.items() if key != entry}, **SMALL)


def test_positions_and_colours_of_another_resolution() -> None:
    """From 32 pixels to 48: the grids of both stages are resampled, the class token's position is kept."""
    rng = np.random.default_rng(0)
    shapes = shapes_of(create_model("pvt_tiny", **SMALL))
    arrays: dict[str, Any] = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    larger = create_model("pvt_tiny", **SMALL | {"image_size": 48, "num_classes": 7})
    found = transfer("pvt_tiny", arrays, shapes_of(larger), transfer_rules(larger), fresh=())
    assert [line.split()[0] for line in found.changed] == ["params/stage1/position", "params/stage2/position"]
    assert found.arrays["params/stage1/position"].shape == (144, 16)
    table = found.arrays["params/stage2/position"]
    assert table.shape == (1 + 36, 24)
    np.testing.assert_array_equal(table[0], arrays["params/stage2/position"][0])
    assert [line.split()[0] for line in found.fresh] == ["params/head/bias", "params/head/kernel"]
