import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.layers.arrays import align_last, wide_type, widen


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 1, 3), ()])
def test_the_last_axes_are_aligned_as_numpy_broadcasts(shape: tuple[int, ...]) -> None:
    value, x = np.arange(max(np.prod(shape, dtype=int), 1), dtype=np.float32).reshape(shape), np.ones((4, 2, 3))
    aligned = align_last(jnp.asarray(value), jnp.asarray(x))
    assert aligned.shape == (1,) * (3 - len(shape)) + shape
    np.testing.assert_array_equal(aligned * jnp.asarray(x), value * x)


@pytest.mark.parametrize(("given", "wide"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32")])
def test_sums_are_in_float32(given: str, wide: str) -> None:
    x = jnp.asarray([1.5, -2.0], given)
    assert wide_type(x) == wide
    assert widen(x).dtype == wide
    np.testing.assert_array_equal(widen(x), [1.5, -2.0])


def test_sums_of_float64_stay_in_float64() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray([1 + 2**-40], jnp.float64)
        assert wide_type(x) == jnp.float64
        assert widen(x)[0] == 1 + 2**-40


def test_the_tests_run_without_implicit_promotion() -> None:
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)
    with pytest.raises(jax.dtypes.TypePromotionError, match="no available implicit dtype promotion path"):
        jnp.ones(3) + jnp.ones(3, jnp.bfloat16)
