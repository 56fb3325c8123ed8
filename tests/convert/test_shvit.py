"""SHViT under the official names and under timm's."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from helpers.official import check_values_keep_their_places, official_shapes, random_arrays, state_of, zeros

from halvit_jax.convert import from_torch, shapes_of, torch_shapes
from halvit_jax.models import create_model
from halvit_jax.models.shvit import SIZES
from halvit_jax.trees import flatten

GOLDEN = ("shvit_s1", "shvit_s1_distilled")
SMALL: dict[str, Any] = {
    "depths": (1, 2),
    "widths": (16, 20),
    "partial_dims": (8, 12),
    "stages": ("i", "s"),
    "stem_strides": (1, 2),
    "num_classes": 3,
    "image_size": 16,
}


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


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_all_sizes_have_the_parts_of_the_official_ones(name: str) -> None:
    size, reference = SIZES[name], official_shapes(GOLDEN["distilled" in name])
    names = torch_shapes(name)
    assert {_without_numbers(key) for key in names} == {_without_numbers(key) for key in reference}
    blocks = [len({key.split(".")[1] for key in names if key.startswith(f"blocks{stage}.")}) for stage in (1, 2, 3)]
    assert blocks == [depth + parts for depth, parts in zip(size["depths"], (0, 3, 3), strict=True)]
    for stage, width in zip((1, 2, 3), size["widths"], strict=True):
        first = f"blocks{stage}.{3 if stage > 1 else 0}"
        assert names[f"{first}.conv.m.c.weight"] == (width, 1, 3, 3)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_small_ones_are_the_official_ones_in_number_and_shape(name: str) -> None:
    assert torch_shapes(name) == official_shapes(name)


@pytest.mark.parametrize("distilled", [False, True])
def test_values_keep_their_places(distilled: bool) -> None:
    fields = SMALL | {"distilled": distilled}
    state = check_values_keep_their_places("shvit_s1", **fields)
    ours, timms = from_torch("shvit_s1", state, **fields), {timms_name(name): array for name, array in state.items()}
    jax.tree.map(np.testing.assert_array_equal, from_torch("shvit_s1", timms, **fields), ours)


def test_timms_names_are_understood() -> None:
    official = official_shapes("shvit_s1")
    state = {timms_name(key): array for key, array in zeros(official).items()}
    assert len(state) == len(official)
    for name in (
        "stages.0.blocks.1.ffn.m.pw1.c.weight",
        "stages.1.downsample.0.m.c.weight",
        "stages.1.downsample.1.m.pw2.bn.bias",
        "stages.1.downsample.2.se.fc1.weight",
        "stages.2.downsample.3.m.bn.weight",
        "stages.2.downsample.4.m.pw1.c.weight",
        "stages.2.blocks.4.mixer.m.proj.1.c.weight",
    ):
        assert name in state
    arrays = flatten(from_torch("shvit_s1", state))
    assert {path: array.shape for path, array in arrays.items()} == shapes_of(create_model("shvit_s1"))


def test_a_state_with_two_classifiers_needs_a_distilled_model() -> None:
    fields = SMALL | {"distilled": True}
    state = state_of(random_arrays("shvit_s1", **fields), "shvit_s1", **fields)
    with pytest.raises(ValueError, match=r"do not fit shvit_s1; 7 unexpected: head_dist.bn.bias, "):
        from_torch("shvit_s1", dict(sorted(state.items())), **SMALL)


def _without_numbers(name: str) -> str:
    """The name without the number of its block, all of which but the first three are alike."""
    first, number, *rest = name.split(".")
    alike = first == "blocks1" or (first in ("blocks2", "blocks3") and int(number) > 2)
    return ".".join([first, *rest]) if alike else name
