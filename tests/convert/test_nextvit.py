"""Next-ViT under the official names."""

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
SMALL: dict[str, Any] = {
    "depths": (1, 2),
    "widths": (16, 24),
    "periods": (0, 2),
    "reductions": (1, 2),
    "stem_widths": (8, 8),
    "stem_strides": (1, 2),
    "head_width": 8,
    "num_classes": 3,
    "image_size": 16,
}


@pytest.fixture(scope="module")
def official(golden: pathlib.Path) -> Shapes:
    """The names and shapes of the reference implementation."""
    case = json.loads((golden / "nextvit_small.json").read_text())
    return {key: tuple(shape) for key, shape in case["state"].items()}


def test_a_state_makes_the_round_trip_and_gives_the_references_logits(
    official: Shapes, golden: pathlib.Path, reference_weights: types.ModuleType
) -> None:
    state = {key: reference_weights.weights(key, shape) for key, shape in official.items()}
    model, variables = create_model("nextvit_small"), from_torch("nextvit_small", state)
    back = to_torch("nextvit_small", variables)
    assert back.keys() == state.keys()
    for key, array in state.items():
        assert (back[key].dtype, back[key].shape) == (array.dtype, array.shape)
        assert back[key].tobytes() == array.tobytes()

    images = jnp.asarray(reference_weights.image(2, 224, 224).transpose(0, 2, 3, 1))
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    with np.load(golden / "nextvit_small.npz") as file:
        reference = file["logits"]
    assert np.abs(logits - reference).max() / reference.std() <= 1e-4


@pytest.mark.parametrize(("name", "groups"), [("nextvit_small", 2), ("nextvit_base", 4), ("nextvit_large", 6)])
def test_all_sizes_have_the_names_of_the_official_ones(name: str, groups: int, official: Shapes) -> None:
    """The third stage is a group of five blocks, 7 to 11, and then some like the next one, 12 to 16."""
    expected = {}
    for key, shape in official.items():
        first, number, rest = key.split(".", 2) if key.startswith("features.") else ("", "0", "")
        more = groups - 2
        if not first or int(number) < 12:
            expected[key] = shape
        elif int(number) > 16:
            expected[f"features.{int(number) + 5 * more}.{rest}"] = shape
        else:
            expected |= {f"features.{int(number) + 5 * i}.{rest}": shape for i in range(more + 1)}
    assert torch_shapes(name) == expected


@pytest.mark.parametrize("name", ["nextvit_small", "nextvit_small_hc"])
def test_values_keep_their_places(name: str) -> None:
    rng = np.random.default_rng(0)
    shapes = shapes_of(create_model(name, **SMALL))
    arrays = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    state = to_torch(name, nest(arrays), **SMALL)
    again = flatten(from_torch(name, state, **SMALL))
    assert again.keys() == arrays.keys()
    assert all(np.array_equal(again[path], array) for path, array in arrays.items())


def test_the_compact_layers_are_named_like_modules() -> None:
    host, compact = (torch_shapes(name, **SMALL) for name in ("nextvit_small", "nextvit_small_hc"))
    block = {key.removeprefix("features.2."): shape for key, shape in compact.items() if key.startswith("features.2.")}
    new = {key: shape for key, shape in block.items() if f"features.2.{key}" not in host}
    norm = ("weight", "bias", "running_mean", "running_var")
    factors = {"first": (16, 64, 1, 1), "second": (32, 16, 1, 1)}
    assert new == {
        "e_mhsa.hallucination.across.weight": (1, 2, 1, 1),
        "e_mhsa.hallucination.within.weight": (1, 1, 3, 3),
        **{f"mlp.conv2.{name}.{i}.conv.weight": shape for name, shape in factors.items() for i in (0, 1)},
        **{f"mlp.conv2.{f}.{i}.norm.{leaf}": factors[f][:1] for f in factors for i in (0, 1) for leaf in norm},
        **{f"mlp.conv2.{f}.{i}.norm.num_batches_tracked": () for f in factors for i in (0, 1)},
    }
