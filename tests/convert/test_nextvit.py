"""Next-ViT under the official names."""

from typing import Any

import pytest
from helpers.official import check_values_keep_their_places, official_shapes

from halvit_jax.convert import torch_shapes

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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "groups"), [("nextvit_small", 2), ("nextvit_base", 4), ("nextvit_large", 6)])
def test_all_sizes_have_the_names_of_the_official_ones(name: str, groups: int) -> None:
    """The third stage is a group of five blocks, 7 to 11, and then some like the next one, 12 to 16."""
    expected = {}
    for key, shape in official_shapes("nextvit_small").items():
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
    check_values_keep_their_places(name, **SMALL)


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
