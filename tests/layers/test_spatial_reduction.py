import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.layers.ffn import gelu
from halvit_jax.layers.spatial_reduction import SpatialReductionAttention, pool_to

B = 2


def _attention(grid: tuple[int, int], **fields: Any) -> tuple[SpatialReductionAttention, dict[str, Any], jax.Array]:
    """A layer of width 12 and 3 heads, random variables, and tokens [2, n, 12] for it."""
    layer = SpatialReductionAttention(12, 3, grid, **fields)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, grid[0] * grid[1], 12)), jnp.float32)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))["params"]
    return layer, jax.tree.map(lambda s: (0.5 * rng.standard_normal(s.shape)).astype(np.float32), shapes), x


def _dense(params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    return x @ params["kernel"] + params["bias"]


def _normal(params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * params["scale"] + params["bias"]


@pytest.mark.parametrize("fields", [{"reduction": 2}, {"reduction": 3}, {"pool_size": 3}, {}])
def test_attention_over_fewer_keys_is_what_its_docstring_says(fields: dict[str, int]) -> None:
    """On a map whose last rows and columns are left over, or whose boxes overlap."""
    grid, k = (7, 8), fields.get("reduction", 1)
    layer, params, tokens = _attention(grid, **fields)
    out, kept = jax.jit(lambda p: layer.apply({"params": p}, tokens, mutable=["intermediates"]))(params)
    x = y = np.asarray(tokens)
    if fields:
        y = y.reshape(B, *grid, 12)
        y = np.asarray(pool_to(jnp.asarray(y), 3)) if "pool_size" in fields else y
        kernel = params["reduction"]["kernel"].reshape(-1, 12)  # rows, columns and channels of a square -> a key
        squares = [
            y[:, top : top + k, left : left + k].reshape(B, -1) @ kernel
            for top in range(0, y.shape[1] - k + 1, k)
            for left in range(0, y.shape[2] - k + 1, k)
        ]
        y = _normal(params["reduction_norm"], np.stack(squares, 1) + params["reduction"]["bias"])
        y = np.asarray(gelu(jnp.asarray(y))) if "pool_size" in fields else y
    query, (key, value) = _dense(params["query"], x), np.split(_dense(params["key_value"], y), 2, -1)
    heads = []
    for head in np.split(np.arange(12), 3):
        logits = query[..., head] @ key[..., head].swapaxes(1, 2) / 2
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        heads.append(weights @ value[..., head])
    np.testing.assert_allclose(out, _dense(params["output"], np.concatenate(heads, -1)), rtol=1e-4, atol=1e-4)
    assert kept["intermediates"]["weights"][0].shape == (B, 3, 56, y.shape[1])


def test_hallucinated_heads_of_rectangular_maps() -> None:
    layer, params, x = _attention((4, 6), reduction=2, real_heads=0.5)
    assert params["query"]["kernel"].shape == (12, 8)  # 2 of 3 heads
    assert params["key_value"]["kernel"].shape == (12, 8 + 12)
    assert params["maps"]["hallucination"]["across"].shape == (2, 1)
    _, kept = jax.jit(lambda p: layer.apply({"params": p}, x, mutable=["intermediates"]))(params)
    weights = kept["intermediates"]["weights"][0]
    assert weights.shape == (B, 3, 24, 6)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


def test_without_reduction_other_tokens_may_stand_before_those_of_the_map() -> None:
    layer, params, x = _attention((2, 3))
    tokens = jnp.concatenate([x[:, :1], x], 1)
    assert jax.eval_shape(lambda p: layer.apply({"params": p}, tokens), params).shape == (B, 7, 12)


def test_a_map_smaller_than_its_reduction_is_refused() -> None:
    message = "a map of 3x4 tokens cannot be reduced by 4; lower model.reductions or raise model.image_size"
    with pytest.raises(ValueError, match=message):
        _attention((3, 4), reduction=4)


@pytest.mark.parametrize("grid", [(14, 7), (10, 9), (3, 1)])
def test_boxes_of_any_map_are_averaged(grid: tuple[int, int]) -> None:
    x, size = np.random.default_rng(0).standard_normal((B, *grid, 3)).astype(np.float32), 7
    rows, columns = ([(i * n // size, math.ceil((i + 1) * n / size)) for i in range(size)] for n in grid)
    expected = [[x[:, slice(*row), slice(*column)].mean((1, 2)) for column in columns] for row in rows]
    np.testing.assert_allclose(pool_to(jnp.asarray(x), size), np.transpose(expected, (2, 0, 1, 3)), atol=1e-6)
