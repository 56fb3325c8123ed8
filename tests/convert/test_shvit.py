"""SHViT under the official names and under timm's."""

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
from halvit_jax.models import create_model
from halvit_jax.models.shvit import SIZES

GOLDEN = ("shvit_s1", "shvit_s1_distilled")
SMALL: dict[str, Any] = {
    "depths": (1, 2),
    "widths": (16, 20),
    "partial": (8, 12),
    "stages": ("i", "s"),
    "stem_strides": (1, 2),
    "num_classes": 3,
    "image_size": 16,
}


@pytest.fixture(scope="module")
def official(golden: pathlib.Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The names and shapes of the reference implementation."""
    cases = {name: json.loads((golden / f"{name}.json").read_text()) for name in GOLDEN}
    return {name: {key: tuple(shape) for key, shape in case["state"].items()} for name, case in cases.items()}


def timms_name(name: str) -> str:
    """What timm calls the entry of an official name."""
    found = re.fullmatch(r"blocks(\d)\.(\d+)\.(.*)", name)
    if not found:
        return name
    stage, number, rest = int(found[1]), int(found[2]), found[3]
    if stage == 1 or number > 2:
        return f"stages.{stage - 1}.blocks.{number - 3 * (stage > 1)}.{rest}"
    if number == 1:
        return f"stages.{stage - 1}.downsample.2.{rest}"
    part, rest = rest.split(".", 1)
    return f"stages.{stage - 1}.downsample.{int(part) + 3 * (number == 2)}.{rest}"


@pytest.mark.parametrize("name", GOLDEN)
def test_a_state_makes_the_round_trip_and_gives_the_references_logits(
    name: str,
    official: dict[str, dict[str, tuple[int, ...]]],
    golden: pathlib.Path,
    reference_weights: types.ModuleType,
) -> None:
    state = {key: reference_weights.weights(key, shape) for key, shape in official[name].items()}
    model, variables = create_model(name), from_torch(name, state)
    back = to_torch(name, variables)
    assert back.keys() == state.keys()
    for key, array in state.items():
        assert (back[key].dtype, back[key].shape) == (array.dtype, array.shape)
        assert back[key].tobytes() == array.tobytes()

    images = jnp.asarray(reference_weights.image(2, 224, 224).transpose(0, 2, 3, 1))
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    with np.load(golden / f"{name}.npz") as file:
        reference = file["logits"]
    assert np.abs(logits - reference).max() / reference.std() <= 1e-4


@pytest.mark.parametrize("name", SIZES)
def test_all_sizes_have_the_parts_of_the_official_ones(
    name: str, official: dict[str, dict[str, tuple[int, ...]]]
) -> None:
    size, reference = SIZES[name], official[GOLDEN["distilled" in name]]
    names = torch_shapes(name)
    assert {_without_numbers(key) for key in names} == {_without_numbers(key) for key in reference}
    blocks = [len({key.split(".")[1] for key in names if key.startswith(f"blocks{stage}.")}) for stage in (1, 2, 3)]
    assert blocks == [depth + parts for depth, parts in zip(size["depths"], (0, 3, 3), strict=True)]
    for stage, width in zip((1, 2, 3), size["widths"], strict=True):
        first = f"blocks{stage}.{3 if stage > 1 else 0}"
        assert names[f"{first}.conv.m.c.weight"] == (width, 1, 3, 3)


def test_the_small_ones_are_the_official_ones_in_number_and_shape(
    official: dict[str, dict[str, tuple[int, ...]]],
) -> None:
    for name, shapes in official.items():
        assert torch_shapes(name) == shapes


@pytest.mark.parametrize("distilled", [False, True])
def test_values_keep_their_places(distilled: bool) -> None:
    fields = SMALL | {"distilled": distilled}
    rng = np.random.default_rng(0)
    shapes = shapes_of(create_model("shvit_s1", **fields))
    arrays = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    state = to_torch("shvit_s1", nest(arrays), **fields)
    for names in (state, {timms_name(name): array for name, array in state.items()}):
        again = flatten(from_torch("shvit_s1", names, **fields))
        assert again.keys() == arrays.keys()
        assert all(np.array_equal(again[path], array) for path, array in arrays.items())


def test_timms_names_are_understood(official: dict[str, dict[str, tuple[int, ...]]]) -> None:
    zeros = {timms_name(key): np.broadcast_to(np.float32(0), shape) for key, shape in official["shvit_s1"].items()}
    assert len(zeros) == len(official["shvit_s1"])
    for name in (
        "stages.0.blocks.1.ffn.m.pw1.c.weight",
        "stages.1.downsample.0.m.c.weight",
        "stages.1.downsample.1.m.pw2.bn.bias",
        "stages.1.downsample.2.se.fc1.weight",
        "stages.2.downsample.3.m.bn.weight",
        "stages.2.downsample.4.m.pw1.c.weight",
        "stages.2.blocks.4.mixer.m.proj.1.c.weight",
    ):
        assert name in zeros
    arrays = flatten(from_torch("shvit_s1", zeros))
    assert {path: array.shape for path, array in arrays.items()} == shapes_of(create_model("shvit_s1"))


def test_a_state_with_two_classifiers_needs_a_distilled_model() -> None:
    fields = SMALL | {"distilled": True}
    shapes = shapes_of(create_model("shvit_s1", **fields))
    state = to_torch("shvit_s1", nest({path: np.zeros(shape, np.float32) for path, shape in shapes.items()}), **fields)
    with pytest.raises(ValueError, match=r"do not fit shvit_s1; 7 left over: head_dist.bn.bias, "):
        from_torch("shvit_s1", dict(sorted(state.items())), **SMALL)


def _without_numbers(name: str) -> str:
    """The name without the number of its block, all of which but the first three are alike."""
    first, number, *rest = name.split(".")
    alike = first == "blocks1" or (first in ("blocks2", "blocks3") and int(number) > 2)
    return ".".join([first, *rest]) if alike else name
