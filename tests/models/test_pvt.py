import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.jaxprs import count_remats

import halvit_jax
from halvit_jax.layers import conv
from halvit_jax.layers.drop import DropPath
from halvit_jax.layers.embed import resampled
from halvit_jax.layers.ffn import Compact, gelu
from halvit_jax.models import create_model
from halvit_jax.models.pvt import TINY_SHAPE
from halvit_jax.models.pvt_v2 import ConvMlp
from halvit_jax.trees import flatten, map_paths, variable_shapes

pytestmark = pytest.mark.slow  # what every family is held to by default stands in test_contract.py
SMALL = TINY_SHAPE | {"num_classes": 5}
ONE = SMALL | {"strides": (4,), "widths": (16,), "depths": (1,), "ffn_ratios": (2,), "reductions": (1,)}
VERSIONS = ["pvt_tiny", "pvt_v2_b0"]


def _images(height: int = 32, width: int | None = None) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((2, height, width or height, 3)), jnp.float32)


def _variables(model: nn.Module) -> Any:
    rng = np.random.default_rng(0)

    def values(path: str, shape: Any) -> np.ndarray:
        positive = path.endswith("var")
        return (rng.uniform(0.5, 1.5, shape.shape) if positive else 0.2 * rng.standard_normal(shape.shape)).astype("f")

    return map_paths(values, variable_shapes(model))


@functools.cache
def _compiled(model: nn.Module, method: str) -> Any:
    return jax.jit(lambda v, x: model.apply(v, x, train=False, method=method))


def _apply(model: nn.Module, variables: Any, images: jax.Array, method: str = "__call__") -> Any:
    with conv.xla_convolutions():  # quicker to compile
        return _compiled(model, method)(variables, images)


def test_pvt_classifies_by_a_token_that_its_maps_know_nothing_of() -> None:
    model = create_model("pvt_tiny", **SMALL)
    variables = _variables(model)
    logits, maps = _apply(model, variables, _images()), _apply(model, variables, _images(), method="features")
    assert {stride: x.shape for stride, x in maps.items()} == {4: (2, 8, 8, 16), 8: (2, 4, 4, 24)}
    assert variables["params"]["stage1"]["position"].shape == (64, 16)
    assert variables["params"]["stage2"]["position"].shape == (1 + 16, 24)
    ramp = np.arange(24, dtype=np.float32)  # a constant would not pass the norms
    changed = []
    for part in ("class_token", "position"):
        stage = dict(variables["params"]["stage2"])
        stage[part] = stage[part] + (ramp if part == "class_token" else ramp * np.eye(17, 1, dtype=np.float32))
        changed.append({"params": variables["params"] | {"stage2": stage}})
    for other in changed:
        assert float(jnp.abs(_apply(model, other, _images()) - logits).max()) > 1e-3
        for stride, x in _apply(model, other, _images(), method="features").items():
            np.testing.assert_array_equal(x, maps[stride])


def test_pvt_v2_classifies_by_the_mean_of_its_last_map() -> None:
    model = create_model("pvt_v2_b0", **SMALL)
    variables = _variables(model)
    maps = _apply(model, variables, _images(36, 44), method="features")
    assert {stride: x.shape for stride, x in maps.items()} == {4: (2, 9, 11, 16), 8: (2, 5, 6, 24)}
    head = variables["params"]["head"]
    pooled = np.asarray(maps[8]).mean((1, 2))
    logits = _apply(model, variables, _images(36, 44))
    np.testing.assert_allclose(logits, pooled @ head["kernel"] + head["bias"], atol=1e-5)
    norm = variables["params"]["stage1"]["norm"]
    x = (np.asarray(maps[4]) - norm["bias"]) / norm["scale"]
    np.testing.assert_allclose(x.mean(-1), 0.0, atol=1e-4)  # each map is normalised


def test_positions_are_resampled_for_images_of_other_sizes() -> None:
    """At the centres of the new cells, between the four positions around them; at the edges they go on as they are."""
    table, grid = np.random.default_rng(0).standard_normal((4, 4, 3)).astype(np.float32), (6, 2)
    weights = []
    for side in grid:
        places = np.clip((np.arange(side) + 0.5) * 4 / side - 0.5, 0, 3)
        weights.append(np.maximum(0, 1 - np.abs(places[:, None] - np.arange(4))))
    expected = np.einsum("um,vn,mnd->uvd", *weights, table).reshape(-1, 3)
    bilinear = resampled(jnp.asarray(table.reshape(16, 3)), (4, 4), grid, method="linear", antialias=False)
    np.testing.assert_allclose(bilinear, expected, atol=1e-6)

    model = create_model("pvt_tiny", **SMALL)
    maps = jax.eval_shape(
        lambda v: model.apply(v, _images(48, 40), train=False, method="features"), variable_shapes(model)
    )
    assert {stride: x.shape[1:3] for stride, x in maps.items()} == {4: (12, 10), 8: (6, 5)}


def test_a_map_that_cannot_be_cut_is_refused() -> None:
    model = create_model("pvt_tiny", **SMALL)
    message = "9x8 pixels or tokens cannot be cut into patches of 2x2"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda v: model.apply(v, jnp.zeros((1, 36, 32, 3)), train=False), variable_shapes(model))


def test_linear_attention_has_as_many_keys_for_maps_of_any_size() -> None:
    model = create_model("pvt_v2_b2_li", **SMALL)
    assert model.pool_size == 7
    found = jax.eval_shape(lambda v: halvit_jax.capture(model, v, _images(40, 72)), variable_shapes(model))["attention"]
    shapes = {name: weights.shape for name, weights in found.items()}
    assert shapes == {"stage1/block0": (2, 2, 180, 49), "stage2/block0": (2, 3, 45, 49)}


@pytest.mark.parametrize("relu", [False, True])
def test_the_convolution_stands_before_gelu_and_behind_relu(relu: bool) -> None:
    layer = ConvMlp(4, 6, Compact(), (3, 5), relu, jnp.float32)
    x = np.random.default_rng(0).standard_normal((2, 15, 4)).astype(np.float32)
    variables = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, train=False))
    params = map_paths(lambda p, a: np.random.default_rng(len(p)).standard_normal(a.shape), variables)["params"]
    h = x @ params["expand"]["kernel"] + params["expand"]["bias"]
    h = np.pad((np.maximum(h, 0) if relu else h).reshape(2, 3, 5, 6), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = params["depthwise"]["kernel"][:, :, 0]
    h = sum(h[:, i : i + 3, j : j + 5] * kernel[i, j] for i in range(3) for j in range(3))
    h = np.asarray(gelu(jnp.asarray(h + params["depthwise"]["bias"], jnp.float32))).reshape(2, 15, 6)
    expected = h @ params["reduce"]["kernel"] + params["reduce"]["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, x, train=False), expected, rtol=1e-4, atol=1e-4)


def test_epsilons_and_stochastic_depth_are_those_of_the_reference() -> None:
    for name in VERSIONS:
        model = create_model(name, **SMALL | {"depths": (2, 4), "drop_path": 0.5})
        epsilons, rates = {}, []

        def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            module = context.module
            if isinstance(module, nn.LayerNorm) and context.method_name == "__call__":
                epsilons.setdefault(module.name, set()).add(module.epsilon)  # noqa: B023
            if isinstance(module, DropPath) and context.method_name == "__call__":
                rates.append(module.rate)  # noqa: B023
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            jax.eval_shape(lambda v, m=model: m.apply(v, _images(), train=False), variable_shapes(model))
        own = {"embed_norm": {1e-5}, "reduction_norm": {1e-5}}
        assert epsilons == own | {"attention_norm": {1e-6}, "ffn_norm": {1e-6}, "norm": {1e-6}}
        np.testing.assert_allclose(rates, 2 * list(np.repeat(np.arange(6) / 10, 2)))  # in `_shapes` and in `apply`


def _initial(name: str, layers: dict[str, float]) -> dict[str, jax.Array]:
    """What these layers of the first stage begin with; XLA leaves out all else."""
    model = create_model(name, **SMALL)

    @jax.jit
    def initial() -> dict[str, jax.Array]:
        params = flatten(model.init(jax.random.key(0), _images(), train=False)["params"])
        return {f"{layer}/{part}": params[f"stage1/{layer}/{part}"] for layer in layers for part in ("kernel", "bias")}

    return initial()


def test_convolutions_begin_as_in_the_references() -> None:
    bounds = {"embed": 1 / math.sqrt(16 * 3), "block0/attention/reduction": 1 / math.sqrt(4 * 16)}
    for path, values in _initial("pvt_tiny", bounds).items():
        bound = bounds[path.rpartition("/")[0]]
        assert 0.5 * bound < float(jnp.abs(values).max()) <= bound
        assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.4)
    fans = {"embed": 49 * 16, "block0/attention/reduction": 4 * 16, "block0/ffn/depthwise": 9}
    values = _initial("pvt_v2_b0", fans)
    for layer, fan in fans.items():
        assert float(values[f"{layer}/kernel"].std()) == pytest.approx(math.sqrt(2 / fan), rel=0.15)
        assert not values[f"{layer}/bias"].any()


def test_heads_are_hallucinated_in_the_stages_that_have_two_and_more() -> None:
    """1, 2, 5 and 8 heads of 64: 1, 1, 3 and 4 real ones."""
    params = variable_shapes(create_model("pvt_tiny_hc"))["params"]
    stages = [params[f"stage{i}"]["block0"] for i in (1, 2, 3, 4)]
    assert [stage["attention"]["query"]["kernel"].shape[1] // 64 for stage in stages] == [1, 1, 3, 4]
    made = [flatten(stage["attention"]).get("maps/hallucination/across") for stage in stages]
    assert [None if maps is None else maps.shape for maps in made] == [None, (1, 1), (3, 2), (4, 4)]
    assert [flatten(stage["ffn"])["reduce/first0/dense/kernel"].shape[1] for stage in stages] == [32, 64, 160, 256]


@pytest.mark.parametrize("name", ["pvt_tiny_hc", "pvt_v2_b2_hc"])
def test_a_folded_model_computes_the_same(name: str) -> None:
    model = create_model(name, **ONE)
    variables = _variables(model)
    folded, fewer = halvit_jax.fold(model, variables)
    assert jax.tree.map(np.shape, fewer) == jax.tree.map(np.shape, variable_shapes(folded))
    expected = _apply(model, variables, _images())
    np.testing.assert_allclose(_apply(folded, fewer, _images()), expected, rtol=1e-4, atol=1e-4)


def test_remat_changes_neither_outputs_nor_gradients() -> None:
    results = []
    for remat in (False, True):
        model = create_model("pvt_v2_b0", **ONE, drop_path=0.5, remat=remat)

        def loss(params: Any, model: nn.Module = model) -> jax.Array:
            rngs = {"drop_path": jax.random.key(3)}
            return jnp.sum(jnp.sin(model.apply({"params": params}, _images(), train=True, rngs=rngs)))

        params = _variables(model)["params"]
        with conv.xla_convolutions():  # quicker to compile
            assert count_remats(loss, params) == remat  # one in each block
            results.append(flatten(jax.jit(jax.value_and_grad(loss))(params)))
    plain, recomputed = results
    assert plain.keys() == recomputed.keys()
    for path, value in plain.items():
        np.testing.assert_allclose(recomputed[path], value, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": ()}, "model.depths=() must have a value for each stage"),
        ({"strides": (4, 2)}, "model.strides=(4, 2) must have a value for each stage of model.depths"),
        ({"depths": (2, 2, 0, 2)}, "model.depths=(2, 2, 0, 2) must be at least 1 in each stage"),
        ({"strides": (4, 1, 2, 2)}, "model.strides=(4, 1, 2, 2) must be at least 2 in all stages but the first"),
        ({"head_width": 48}, "model.head_width=48 does not divide model.widths=64"),
        ({"ffn_ratios": (8, 8, 4, 0)}, "model.ffn_ratios=(8, 8, 4, 0) leaves nothing of a width of 512"),
        ({"ffn_rank": 1.5}, "model.ffn_rank=1.5 must lie in (0, 1]"),
        ({"drop_path": 1.0}, "model.drop_path=1.0 must lie in [0, 1)"),
        ({"image_size": 240}, "model.strides=32 does not divide model.image_size=240"),
        ({"reductions": (8, 4, 2, 2)}, "model.reductions=(8, 4, 2, 2) must end in 1: a class token is on no map"),
    ],
)
def test_impossible_fields_are_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model("pvt_tiny", **overrides)
