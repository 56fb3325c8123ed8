"""Swin Transformers and Mini-Swins under their authors' names."""

import re
from typing import Any

import numpy as np
import pytest
from helpers.official import Shapes, check_values_keep_their_places, official_shapes, random_arrays
from helpers.tiers import tiered

from halvit_jax.convert import from_torch, shapes_of, to_torch, torch_shapes
from halvit_jax.models import create_model
from halvit_jax.trees import unflatten

SMALL = {"width": 16, "depths": (2, 4), "head_width": 8, "window_size": 4, "image_size": 32, "num_classes": 5}
TIED = {"attention": "tied", "ffn": "tied", "attention_bias": False}


def small(tiny: Shapes) -> Shapes:
    """Of the small models the third stage has 18 layers instead of 6, or 9 blocks of two instead of one of six."""
    rest = {key: shape for key, shape in tiny.items() if not key.startswith("layers.2.blocks.")}
    block = {key: shape for key, shape in tiny.items() if re.match(r"layers\.2\.blocks\.0\.", key)}
    shared = any("_list." in key for key in block)
    if shared:  # of the lists of a block the first two entries
        block = {key: shape for key, shape in block.items() if not re.search(r"(_list|proj_[lw])\.[2-9]", key)}
    for i in range(9 if shared else 18):
        rest |= {key.replace("blocks.0.", f"blocks.{i}."): shape for key, shape in block.items()}
    return rest


def base(tiny: Shapes) -> Shapes:
    """The base models are wider than the small ones by a third; nothing but widths and heads is a multiple of three."""
    wider = {key: tuple(n * 4 // 3 if n % 3 == 0 else n for n in shape) for key, shape in small(tiny).items()}
    return wider | {"patch_embed.proj.weight": (128, 3, 4, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["swin", "mini_swin"])
def test_all_sizes_have_the_names_of_their_authors(family: str) -> None:
    tiny = official_shapes(f"{family}_tiny")
    for name, shapes in (("tiny", tiny), ("small", small(tiny)), ("base", base(tiny))):
        assert torch_shapes(f"{family}_{name}") == shapes


@pytest.mark.parametrize("fields", [{}, TIED])
@pytest.mark.parametrize("name", tiered(["swin_tiny", "mini_swin_tiny"], {"swin_tiny"}))
def test_values_keep_their_places(name: str, fields: dict[str, Any]) -> None:
    fields = SMALL | fields | ({"shares": (2, 2)} if name == "mini_swin_tiny" else {})
    assert len(check_values_keep_their_places(name, **fields)) == len(shapes_of(create_model(name, **fields)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny", "mini_swin_tiny"])
def test_released_files_also_hold_indices_and_masks(name: str) -> None:
    state: dict[str, Any] = {key: np.zeros(shape, np.float32) for key, shape in official_shapes(name).items()}
    more = {f"layers.{i}.blocks.0.attn.relative_position_index": np.zeros((49, 49), np.int64) for i in range(4)}
    more["layers.0.blocks.0.attn_mask"] = np.zeros((64, 49, 49), np.float32)
    assert to_torch(name, from_torch(name, state | more)).keys() == state.keys()
    with pytest.raises(ValueError, match=r"1 unexpected: layers.0.blocks.0.attn.mask$"):
        from_torch(name, state | {"layers.0.blocks.0.attn.mask": np.zeros(())})


def test_no_swin_is_a_deit() -> None:
    variables = unflatten(random_arrays("swin_tiny", **SMALL))
    with pytest.raises(ValueError, match=r"as_deit=True .* swin_tiny"):
        to_torch("swin_tiny", variables, as_deit=True, **SMALL)
