"""Pyramid Vision Transformers under their authors' names."""

import re
from typing import Any

import numpy as np
import pytest
from helpers.official import Shapes, check_values_keep_their_places, official_shapes, random_arrays

from halvit_jax.convert import from_torch, shapes_of, torch_shapes
from halvit_jax.convert.transfer import transfer
from halvit_jax.models import create_model, transfer_rules
from halvit_jax.models.pvt import TINY_SHAPE

SMALL = TINY_SHAPE | {"depths": (2, 1), "num_classes": 5}


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


@pytest.mark.slow
def test_other_sizes_have_the_names_of_their_authors() -> None:
    """The number of blocks is held by the counts of parameters."""
    b1 = shallow(wider(official_shapes("pvt_v2_b0")))
    expected = {"pvt_large": shallow(official_shapes("pvt_tiny")), "pvt_v2_b4": b1, "pvt_v2_b2_li": linear(b1)}
    for name, shapes in expected.items():
        assert torch_shapes(name, depths=(1, 1, 1, 1)) == shapes, name


@pytest.mark.parametrize(("name", "entry"), [("pvt_tiny", "cls_token"), ("pvt_v2_b2_li", "norm2.bias")])
def test_values_keep_their_places(name: str, entry: str) -> None:
    state = check_values_keep_their_places(name, **SMALL)
    assert len(state) == len(shapes_of(create_model(name, **SMALL)))
    assert entry in state
    with pytest.raises(ValueError, match=f"1 missing: {entry}$"):
        from_torch(name, {key: array for key, array in state.items() if key != entry}, **SMALL)


def test_positions_and_colours_of_another_resolution() -> None:
    """From 32 pixels to 48: the grids of both stages are resampled, the class token's position is kept."""
    arrays: dict[str, Any] = random_arrays("pvt_tiny", **SMALL)
    larger = create_model("pvt_tiny", **SMALL | {"image_size": 48, "num_classes": 7})
    found = transfer("pvt_tiny", arrays, shapes_of(larger), transfer_rules(larger), exclude=())
    assert [line.split()[0] for line in found.adapted] == ["params/stage1/position", "params/stage2/position"]
    assert found.arrays["params/stage1/position"].shape == (144, 16)
    table = found.arrays["params/stage2/position"]
    assert table.shape == (1 + 36, 24)
    np.testing.assert_array_equal(table[0], arrays["params/stage2/position"][0])
    assert [line.split()[0] for line in found.initialized] == ["params/head/bias", "params/head/kernel"]
