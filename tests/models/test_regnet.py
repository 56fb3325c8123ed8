import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.shapes import random_variables

from halvit_jax.layers.drop import DropPath
from halvit_jax.models import fold
from halvit_jax.models.regnet import PARTITION_RULES, SIZES, RegNet
from halvit_jax.trees import flatten, variable_shapes

pytestmark = pytest.mark.slow  # what every family is held to by default stands in test_contract.py
SMALL = {"depths": (1, 1, 2, 1), "widths": (16, 24, 32, 48), "group_width": 8, "num_classes": 5, "image_size": 32}
# The line that the widths lie on: w_0, w_a, w_m and the number of blocks (arXiv 2003.13678, tables of the appendix).
LINES = {"regnety_002": (24, 36.44, 2.49, 13), "regnety_160": (200, 106.23, 2.48, 18)}


def _images(size: int = 32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((2, size, size, 3)), jnp.float32)


@pytest.mark.parametrize("name", SIZES)
def test_depths_and_widths_are_those_of_the_quantised_line(name: str) -> None:
    initial, slope, base, blocks = LINES[name]
    line = initial + slope * np.arange(blocks)
    powers = np.round(np.log(line / initial) / math.log(base))
    widths = np.round(initial * base**powers / 8) * 8
    group = SIZES[name]["group_width"]
    stages, depths = np.unique(np.round(widths / group) * group, return_counts=True)
    assert tuple(stages) == SIZES[name]["widths"]
    assert tuple(depths) == SIZES[name]["depths"]


def test_the_hidden_channels_of_squeeze_excite_are_a_quarter_of_what_the_block_is_given() -> None:
    params = flatten(variable_shapes(RegNet(**SIZES["regnety_160"]))["params"])
    hidden = {path.split("/squeeze")[0]: a.shape[-1] for path, a in params.items() if path.endswith("reduce/kernel")}
    expected = {"stage1/block0": 8, "stage1/block1": 56, "stage2/block0": 56, "stage4/block0": 308}
    assert {path: hidden[path] for path in expected} == expected


def test_paths_are_the_ones_checkpoints_know() -> None:
    params = flatten(variable_shapes(RegNet(**SMALL))["params"])
    for path in ("stem/conv/kernel", "stage1/block0/shortcut/norm/scale", "stage3/block1/conv2/conv/kernel"):
        assert path in params
    assert "stage3/block1/shortcut/conv/kernel" not in params
    rules = [[spec for pattern, spec in PARTITION_RULES if re.search(pattern, path)] for path in params]
    assert all(len(specs) == 1 for specs in rules)
    assert all(len(specs[0]) in (0, a.ndim) for specs, a in zip(rules, params.values(), strict=True))


@pytest.mark.parametrize("size", [64, 40])
def test_features_are_the_maps_of_the_stages(size: int) -> None:
    model = RegNet(**SMALL | {"num_classes": 0})
    maps = jax.eval_shape(
        lambda v: model.apply(v, _images(size), train=False, method="features"), variable_shapes(model)
    )
    sides = {stride: -(-size // stride) for stride in (4, 8, 16, 32)}
    widths = dict(zip(sides, SMALL["widths"], strict=True))
    assert {stride: a.shape for stride, a in maps.items()} == {
        stride: (2, side, side, widths[stride]) for stride, side in sides.items()
    }


def test_drop_path_rises_linearly_to_the_last_block() -> None:
    rates = []

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, DropPath) and context.method_name == "__call__":
            rates.append(context.module.rate)
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        variable_shapes(RegNet(**SMALL, drop_path=0.3))
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 5))


def test_remat_recomputes_each_block() -> None:
    variables = variable_shapes(RegNet(**SMALL))
    programs = [
        str(jax.make_jaxpr(lambda v, m=m: m.apply(v, _images(), train=False))(variables))
        for m in (RegNet(**SMALL), RegNet(**SMALL, remat=True))
    ]
    assert [len(re.findall(r"= (?:remat|checkpoint)\d?\[", program)) for program in programs] == [0, 5]


def test_folding_the_norms_changes_no_output() -> None:
    model, images = RegNet(**SMALL), _images()
    variables = random_variables(model)
    expected = model.apply(variables, images, train=False)
    folded, fewer = fold(model, variables)
    assert fewer.keys() == {"params"}
    assert not [path for path in flatten(fewer["params"]) if "norm" in path]
    assert jax.tree.map(jnp.shape, fewer["params"]) == jax.tree.map(jnp.shape, variable_shapes(folded)["params"])
    found = folded.apply(fewer, images, train=False)
    assert np.abs(found - expected).max() / expected.std() <= 1e-5
    with pytest.raises(ValueError, match="is folded and cannot be trained"):
        folded.apply(fewer, images, train=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (1, 1)}, r"model.depths=\(1, 1\) and model.widths=\(224, 448, 1232, 3024\) must have one number"),
        ({"depths": (1, 0, 1, 1)}, r"model.depths=\(1, 0, 1, 1\) and .* of at least 1 for each stage"),
        ({"depths": (), "widths": ()}, "must have one number of at least 1"),
        ({"group_width": 100}, r"model.group_width=100 does not divide all of model.widths=\(224, 448, 1232, 3024\)"),
        ({"group_width": 0}, "model.group_width=0 does not divide"),
        ({"drop_path": 1.0}, r"model.drop_path=1.0 must lie in \[0, 1\)"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegNet(**fields)
