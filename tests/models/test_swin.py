import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from halvit_jax.layers import conv
from halvit_jax.layers.drop import DropPath
from halvit_jax.models import create_model
from halvit_jax.models.swin import PatchMerging, SwinTransformer
from halvit_jax.trees import count, flatten, variable_shapes

pytestmark = pytest.mark.slow  # what every family is held to by default stands in test_contract.py
SMALL = {"width": 16, "depths": (2, 1), "head_width": 8, "window_size": 4, "image_size": 32, "num_classes": 5}


def _images(size: int = 32, width: int | None = None) -> jax.Array:
    shape = (2, size, width or size, 3)
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def _params(model: SwinTransformer) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32), variable_shapes(model)["params"]
    )


def _apply(model: SwinTransformer, params: Any, images: jax.Array, **keywords: Any) -> Any:
    return jax.jit(lambda p, x: model.apply({"params": p}, x, **({"train": False} | keywords)))(params, images)


def test_at_384_windows_are_of_twelve() -> None:
    shapes = variable_shapes(create_model("swin_base", image_size=384, window_size=12))["params"]
    assert count(shapes) == 87_903_584
    tables = {leaf.shape[0] for path, leaf in flatten(shapes).items() if path.endswith("table")}
    assert tables == {23**2}


def test_logits_are_the_classifier_of_the_normalised_mean_of_the_last_map() -> None:
    model = create_model("swin_tiny", **SMALL)
    params = _params(model)
    maps = _apply(model, params, _images(), method="features")
    assert {stride: x.shape for stride, x in maps.items()} == {4: (2, 8, 8, 16), 8: (2, 4, 4, 32)}
    x = np.asarray(maps[8])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = (x * params["norm"]["scale"] + params["norm"]["bias"]).mean((1, 2))
    headless = create_model("swin_tiny", **SMALL | {"num_classes": 0})
    np.testing.assert_allclose(_apply(headless, params, _images()), x, atol=1e-5)
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(_apply(model, params, _images()), logits, atol=1e-5)


def test_merging_takes_rows_before_columns_and_fills_an_odd_map_with_zeros() -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 4, 2)).astype(np.float32)
    layer = PatchMerging(jnp.float32)
    kernel = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
    params = {"norm": {"scale": np.ones(8), "bias": np.zeros(8)}, "reduce": {"kernel": kernel}}
    merged = layer.apply({"params": params}, jnp.asarray(x))
    assert merged.shape == (1, 2, 2, 4)
    x = np.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
    for row in range(2):
        for column in range(2):
            four = [x[0, 2 * row + i, 2 * column + j] for j in (0, 1) for i in (0, 1)]
            tokens = np.concatenate(four)
            tokens = (tokens - tokens.mean()) / np.sqrt(tokens.var() + 1e-5)
            np.testing.assert_allclose(merged[0, row, column], tokens @ kernel, rtol=1e-4, atol=1e-4)


def _reached(depth: int, size: int = 32, window: int = 4) -> np.ndarray:
    """Which tokens of the first stage see the image's first pixel, [8, 8]."""
    model = create_model("swin_tiny", **SMALL | {"depths": (depth,), "image_size": size, "window_size": window})
    params, images = _params(model), _images(size)
    before = _apply(model, params, images, method="features")[4]
    after = _apply(model, params, images.at[:, 0, 0].add(1.0), method="features")[4]
    return np.abs(np.asarray(after - before)).max((0, -1)) > 1e-6


def test_a_block_sees_its_window_and_the_shifted_one_the_parts_of_its_neighbours() -> None:
    one, two = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    one[:4, :4], two[:6, :6] = True, True
    np.testing.assert_array_equal(_reached(1), one)
    np.testing.assert_array_equal(_reached(2), two)


def test_a_window_larger_than_the_map_is_the_map_and_not_shifted() -> None:
    model = create_model("swin_tiny", **SMALL | {"image_size": 16, "depths": (2, 2), "window_size": 7})
    tables = {
        path: leaf.shape for path, leaf in flatten(variable_shapes(model)["params"]).items() if path.endswith("table")
    }
    assert tables["stage1/block1/position_bias/table"] == (7**2, 2)
    assert tables["stage2/block1/position_bias/table"] == (3**2, 4)
    assert _reached(2, size=16, window=7).all()
    same = create_model("swin_tiny", **SMALL | {"image_size": 16, "depths": (2,), "window_size": 4})
    params = _params(same)
    larger = same.clone(window_size=9)
    np.testing.assert_array_equal(_apply(larger, params, _images(16)), _apply(same, params, _images(16)))


def test_images_of_other_sizes_than_it_was_built_for_give_maps_of_theirs() -> None:
    model = create_model("swin_tiny", **SMALL)
    maps = _apply(model, _params(model), _images(36, 44), method="features")
    assert {stride: x.shape[1:3] for stride, x in maps.items()} == {4: (9, 11), 8: (5, 6)}
    assert all(np.isfinite(x).all() for x in maps.values())
    with pytest.raises(ValueError, match=r"images of 30x32 cannot be cut into patches of model.patch_size=4"):
        model.apply({"params": _params(model)}, jnp.zeros((1, 30, 32, 3)), train=False)


def test_the_matrices_of_a_tied_swins_blocks_are_half_of_a_plain_ones() -> None:
    def matrices(**fields: Any) -> int:
        params = flatten(variable_shapes(create_model("swin_tiny", **fields))["params"])
        return sum(leaf.size for path, leaf in params.items() if "block" in path and path.endswith("kernel"))

    tied = {"attention": "tied", "ffn": "tied", "attention_bias": False}
    assert 2 * matrices(**tied) == matrices() == sum(12 * (96 * 2**i) ** 2 * n for i, n in enumerate((2, 2, 6, 2)))


@pytest.mark.parametrize("name", ["swin_tiny", "mini_swin_tiny"])
def test_epsilons_and_stochastic_depth_are_those_of_the_reference(name: str) -> None:
    shares = {"shares": (2, 2)} if name == "mini_swin_tiny" else {}
    model = create_model(name, **SMALL | {"depths": (2, 4), "drop_path": 0.5}, **shares)
    epsilons, rates = [], []

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, nn.LayerNorm) and context.method_name == "__call__":
            epsilons.append(context.module.epsilon)
        if isinstance(context.module, DropPath) and context.method_name == "__call__":
            rates.append(context.module.rate)
        return call(*args, **kwargs)

    shapes = variable_shapes(model)["params"]
    with nn.intercept_methods(watch):
        jax.eval_shape(lambda p, x: model.apply({"params": p}, x, train=False), shapes, _images())
    assert set(epsilons) == {1e-5}
    assert len(epsilons) == 6 * (3 if shares else 2) + 3
    np.testing.assert_allclose(rates, np.repeat(np.arange(6) / 10, 2))


@pytest.mark.parametrize(
    "name",
    ["swin_tiny", "mini_deit_tiny", "mini_swin_tiny"],
)
def test_remat_changes_neither_outputs_nor_gradients(name: str) -> None:
    swin, vit = SMALL | {"depths": (2,)}, {"width": 16, "depth": 2, "num_heads": 2, "image_size": 32, "num_classes": 5}
    shape = {"swin_tiny": swin, "mini_deit_tiny": vit, "mini_swin_tiny": swin | {"shares": (2,)}}[name]
    results = []
    for remat in (False, True):
        model = create_model(name, **shape, drop_path=0.5, remat=remat)

        def loss(params: Any, model: nn.Module = model) -> jax.Array:
            rngs = {"drop_path": jax.random.key(3)}
            return jnp.sum(jnp.sin(model.apply({"params": params}, _images(), train=True, rngs=rngs)))

        with conv.xla_convolutions():  # quicker to compile
            traced = jax.jit(jax.value_and_grad(loss)).trace(_params(model))
        assert str(traced.jaxpr).count("= remat") == 2 * remat  # one in each layer
        results.append(flatten(traced.lower().compile()(_params(model))))
    plain, recomputed = results
    assert plain.keys() == recomputed.keys()
    for path, value in plain.items():
        np.testing.assert_allclose(recomputed[path], value, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention": "half"}, "model.attention='half' is not one of full, tied"),
        ({"ffn": "half"}, "model.ffn='half' is not one of dense, tied"),
        ({"depths": ()}, "model.depths=() must be one stage or more, each of at least 1 block"),
        ({"depths": (2, 0)}, "model.depths=(2, 0) must be one stage or more, each of at least 1 block"),
        ({"head_width": 36}, "model.head_width=36 does not divide model.width=96"),
        ({"patch_size": 5}, "model.patch_size=5 does not divide model.image_size=224"),
        ({"window_size": 0}, "model.window_size=0 must be at least 1"),
        ({"ffn_ratio": 0.0}, "model.ffn_ratio=0.0 leaves nothing of model.width=96"),
        ({"drop_path": 1.0}, "model.drop_path=1.0 must lie in [0, 1)"),
    ],
)
def test_impossible_fields_are_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model("swin_tiny", **overrides)
