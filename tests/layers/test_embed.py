import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.layers.embed import POSITIONS, PatchEmbed, PositionEmbedding, sincos_2d

GRID, D = (3, 5), 16


def _images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(("height", "width", "patch"), [(8, 8, 2), (12, 8, 4), (6, 9, 3)])
def test_patch_embedding_is_a_convolution_read_row_by_row(height: int, width: int, patch: int) -> None:
    images, kernel, bias = _images(2, height, width, 3), _images(patch, patch, 3, D), _images(D)
    expected = jax.lax.conv_general_dilated(
        images, kernel, (patch, patch), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    expected = expected.reshape(2, -1, D) + bias[None, None]
    result = PatchEmbed(D, patch).apply({"params": {"kernel": kernel, "bias": bias}}, images)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_patch_embedding_computes_in_bfloat16_on_float32_parameters() -> None:
    images, layer = _images(2, 8, 8, 3), PatchEmbed(D, 4, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), images))
    variables = jax.tree.map(lambda leaf: _images(*leaf.shape).astype(leaf.dtype), shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    result = layer.apply(variables, images)
    assert result.dtype == jnp.bfloat16
    narrow = PatchEmbed(D, 4).apply(
        jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables), images.astype("bfloat16")
    )
    np.testing.assert_array_equal(np.asarray(result, np.float32), np.asarray(narrow, np.float32))


def test_patch_embedding_starts_like_pytorch_uniform_within_one_over_the_root_of_fan_in() -> None:
    params = PatchEmbed(512, 4).init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))["params"]
    bound = (4 * 4 * 3) ** -0.5
    for leaf in params.values():
        assert float(jnp.abs(leaf).max()) <= bound
        assert float(leaf.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("extra", [0, 1])
def test_learned_positions_are_a_parameter_for_every_token_added_to_it(extra: int) -> None:
    x = _images(2, extra + 15, D)
    layer = PositionEmbedding("learned", GRID)
    variables = layer.init(jax.random.key(0), x)
    table = variables["params"]["embedding"]
    assert table.shape == (extra + 15, D)
    assert float(table.std()) == pytest.approx(0.02, rel=0.2)
    np.testing.assert_array_equal(layer.apply(variables, x), x + table[None])


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_fixed_positions_have_no_parameter_and_leave_extra_tokens_alone(extra: int) -> None:
    x, layer = _images(2, extra + 15, D), PositionEmbedding("sincos", GRID)
    assert layer.init(jax.random.key(0), x) == {}
    result = layer.apply({}, x)
    np.testing.assert_array_equal(result[:, :extra], x[:, :extra])
    np.testing.assert_array_equal(result[:, extra:], np.asarray(x)[:, extra:] + sincos_2d(GRID, D))


def test_no_positions_change_nothing() -> None:
    x, layer = _images(2, 15, D), PositionEmbedding("none", GRID)
    assert layer.init(jax.random.key(0), x) == {}
    np.testing.assert_array_equal(layer.apply({}, x), x)


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_keep_the_type_of_the_tokens(kind: str) -> None:
    x, layer = _images(2, 15, D).astype(jnp.bfloat16), PositionEmbedding(kind, GRID)
    variables = layer.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} <= {jnp.dtype(jnp.float32)}
    assert layer.apply(variables, x).dtype == jnp.bfloat16


def test_the_sine_cosine_table_is_its_formula() -> None:
    table = sincos_2d(GRID, D, temperature=100.0)
    quarter = D // 4
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            for i in range(quarter):
                omega = 100.0 ** (-i / (quarter - 1))
                found = table[row * GRID[1] + column, i::quarter]
                expected = [f(axis * omega) for axis in (column, row) for f in (np.sin, np.cos)]
                np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_sine_cosine_table_tells_places_apart_by_their_distance_only() -> None:
    table = sincos_2d(GRID, D).astype(np.float64)
    np.testing.assert_allclose((table**2).sum(1), D / 2, rtol=1e-6)  # sin^2 + cos^2 = 1, D / 2 times
    products = (table @ table.T).reshape(*GRID, *GRID)
    np.testing.assert_allclose(products[0, 0, 1, 2], products[1, 2, 2, 4], rtol=1e-6)
    np.testing.assert_allclose(products[0, 1, 2, 1], products[0, 3, 2, 3], rtol=1e-6)
    assert len(np.unique(table.round(6), axis=0)) == GRID[0] * GRID[1]


def test_the_sine_cosine_table_exists_at_the_smallest_width() -> None:
    expected = [[np.sin(column), np.cos(column), np.sin(row), np.cos(row)] for row in range(2) for column in range(2)]
    np.testing.assert_allclose(sincos_2d((2, 2), 4), expected, atol=1e-6)


def test_learned_positions_are_resampled_to_another_grid_and_those_of_tokens_kept() -> None:
    table = np.random.default_rng(0).standard_normal((1 + 16, D)).astype(np.float32)
    layer, x = PositionEmbedding("learned", (4, 4)), jnp.zeros((2, 1 + 12, D))
    added = np.asarray(layer.apply({"params": {"embedding": table}}, x, (2, 6)))
    np.testing.assert_array_equal(added[:, 0], table[[0, 0]])
    expected = jax.image.resize(table[1:].reshape(4, 4, D), (2, 6, D), "bicubic").reshape(12, D)
    np.testing.assert_allclose(added[0, 1:], expected, atol=1e-6)
    np.testing.assert_array_equal(layer.apply({"params": {"embedding": table}}, jnp.zeros((1, 17, D)))[0], table)


def test_sine_cosine_positions_are_those_of_the_given_grid() -> None:
    added = PositionEmbedding("sincos", (4, 4)).apply({}, jnp.zeros((1, 1 + 12, 8)), (2, 6))
    np.testing.assert_allclose(added[0, 1:], sincos_2d((2, 6), 8), atol=1e-6)


def test_what_cannot_be_cut_into_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="9x8 pixels or tokens cannot be cut into patches of 4x4"):
        PatchEmbed(D, 4).init(jax.random.key(0), jnp.zeros((1, 9, 8, 3)))
