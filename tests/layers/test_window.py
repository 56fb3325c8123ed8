import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
