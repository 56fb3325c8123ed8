import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.layers.ffn import gelu
from halvit_jax.layers.spatial_reduction import SpatialReductionAttention, pool_to
from halvit_jax.layers.window import RelativePositionBias, Windows, offsets

B, D = 2, 3
CUTS = [((6, 9), 3, 0), ((6, 9), 3, 1), ((8, 8), 4, 2), ((5, 7), 4, 2), ((5, 7), 3, 0)]  # grid, size, shift


def _map(grid: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((B, *grid, D)).astype(np.float32)


def _padded(grid: tuple[int, int], size: int) -> tuple[int, int]:
    return (-(-grid[0] // size) * size, -(-grid[1] // size) * size)


def _places(grid: tuple[int, int], size: int, shift: int) -> list[list[tuple[int, int]]]:
    """Row and column in the padded map of every token of every window, one after the other."""
    height, width = _padded(grid, size)
    return [
        [
            ((top + row + shift) % height, (left + column + shift) % width)
            for row in range(size)
            for column in range(size)
        ]
        for top in range(0, height, size)
        for left in range(0, width, size)
    ]


@pytest.mark.parametrize(("grid", "size", "shift"), CUTS)
def test_windows_are_cut_row_by_row_and_put_together_again(grid: tuple[int, int], size: int, shift: int) -> None:
    x, windows = _map(grid), Windows(grid, size, shift)
    height, width = _padded(grid, size)
    padded = np.zeros((B, height, width, D), np.float32)
    padded[:, : grid[0], : grid[1]] = x
    places = _places(grid, size, shift)
    expected = [[padded[b, row, column] for row, column in window] for b in range(B) for window in places]
    np.testing.assert_array_equal(windows.split(jnp.asarray(x)), expected)
    np.testing.assert_array_equal(windows.join(windows.split(jnp.asarray(x))), x)


@pytest.mark.parametrize(("grid", "size", "shift"), CUTS)
def test_pairs_that_are_no_neighbours_in_the_map_are_masked(grid: tuple[int, int], size: int, shift: int) -> None:
    """Tokens of one window of the moved map lie further apart in the map itself only where an edge is between them."""
    places = np.array(_places(grid, size, shift))  # [m, n, 2]
    apart = (np.abs(places[:, :, None] - places[:, None]) >= size).any(-1)
    logits = np.random.default_rng(0).standard_normal((B, *apart.shape[:1], 2, *apart.shape[1:])).astype(np.float32)
    expected = logits - 100 * apart[:, None]
    flat = jnp.asarray(logits.reshape(-1, *logits.shape[2:]))
    masked = Windows(grid, size, shift).mask(flat)
    np.testing.assert_allclose(masked, expected.reshape(flat.shape), rtol=1e-6)
    assert apart.any() == (shift > 0)
    assert Windows(grid, size, shift).mask(flat.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_bias_of_a_pair_depends_on_its_offset_alone() -> None:
    size, heads = 3, 2
    layer = RelativePositionBias(size, heads)
    shapes = jax.eval_shape(layer.init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == {"params": {"table": (25, heads)}}
    table = np.random.default_rng(0).standard_normal((25, heads)).astype(np.float32)
    bias = layer.apply({"params": {"table": table}})
    for query in range(9):
        for key in range(9):
            rows, columns = query // 3 - key // 3, query % 3 - key % 3
            np.testing.assert_array_equal(bias[:, query, key], table[(rows + 2) * 5 + columns + 2])
    assert sorted(set(offsets(size).flat)) == list(range(25))


# Over fewer keys.


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
    x, size = _map(grid), 7
    rows, columns = ([(i * n // size, math.ceil((i + 1) * n / size)) for i in range(size)] for n in grid)
    expected = [[x[:, slice(*row), slice(*column)].mean((1, 2)) for column in columns] for row in rows]
    np.testing.assert_allclose(pool_to(jnp.asarray(x), size), np.transpose(expected, (2, 0, 1, 3)), atol=1e-6)
