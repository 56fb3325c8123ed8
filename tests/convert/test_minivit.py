"""Mini-DeiTs under their authors' names; Mini-Swins are with the Swins."""

from typing import Any

import pytest
from helpers.official import check_values_keep_their_places, official_shapes, random_arrays

from halvit_jax.convert import shapes_of, to_torch, torch_shapes
from halvit_jax.models import create_model
from halvit_jax.trees import unflatten

TINY = {"width": 32, "depth": 6, "num_heads": 2, "patch_size": 8, "image_size": 24, "num_classes": 5, "share": 3}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "ratio"), [("tiny", 1), ("small", 2), ("base", 4)])
def test_all_sizes_have_the_names_of_their_authors(size: str, ratio: int) -> None:
    # Widths and heads are multiples of three in the tiny model, and nothing else is, but for the three colours.
    wider = {
        key: tuple(n * ratio if n % 3 == 0 else n for n in shape)
        for key, shape in official_shapes("mini_deit_tiny").items()
    }
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
    state = check_values_keep_their_places("mini_deit_tiny", **fields)
    assert len(state) == len(shapes_of(create_model("mini_deit_tiny", **fields)))


def test_no_deit_computes_what_a_mini_deit_does() -> None:
    with pytest.raises(ValueError, match=r"as_deit=True: a DeiT has no mixed heads .* as mini_deit_tiny does"):
        to_torch("mini_deit_tiny", unflatten(random_arrays("mini_deit_tiny", **TINY)), as_deit=True, **TINY)
