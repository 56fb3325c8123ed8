"""RegNets under timm's names."""

import json
import math
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.convert import from_torch, to_torch, torch_shapes
from halvit_jax.models import create_model


@pytest.fixture(scope="module")
def official(golden: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the smallest model in timm."""
    case: dict[str, Any] = json.loads((golden / "regnety_002.json").read_text())
    return {name: tuple(shape) for name, shape in case["state"].items()}


def test_a_state_makes_the_round_trip_and_gives_timms_logits(
    official: dict[str, tuple[int, ...]], golden: pathlib.Path, reference_weights: types.ModuleType
) -> None:
    state = {name: reference_weights.weights(name, shape) for name, shape in official.items()}
    model, variables = create_model("regnety_002"), from_torch("regnety_002", state)
    back = to_torch("regnety_002", variables)
    assert back.keys() == state.keys()
    for name, array in state.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes()
    images = jnp.asarray(reference_weights.image(2, 224, 224).transpose(0, 2, 3, 1))
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    with np.load(golden / "regnety_002.npz") as file:
        reference = file["logits"]
    assert np.abs(logits - reference).max() / reference.std() <= 1e-4


def test_the_teacher_has_the_names_of_the_smallest_for_more_blocks(official: dict[str, tuple[int, ...]]) -> None:
    shapes = torch_shapes("regnety_160")
    expected = {name for name in official if not name.startswith("s")} | {n for n in official if n.startswith("stem")}
    for stage, depth in enumerate((2, 4, 11, 1), start=1):
        for block in range(1, depth + 1):
            like = "s4.b2." if block > 1 else "s4.b1."  # only the first block of a stage has a downsampling
            expected |= {n.replace(like, f"s{stage}.b{block}.") for n in official if n.startswith(like)}
    assert set(shapes) == expected
    weights = {name: shape for name, shape in shapes.items() if "running" not in name and "tracked" not in name}
    assert sum(math.prod(shape) for shape in weights.values()) == 83_590_140
