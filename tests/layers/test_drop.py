import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.layers.drop import DropPath, linear_rates, stage_rates


def _training(rate: float, x: jax.Array, seed: int = 0) -> np.ndarray:
    return np.asarray(DropPath(rate).apply({}, x, train=True, rngs={"drop_path": jax.random.key(seed)}))


def test_inference_changes_nothing_and_asks_for_no_randomness() -> None:
    x = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(DropPath(0.9).apply({}, x, train=False), x)


def test_a_rate_of_zero_changes_nothing_and_asks_for_no_randomness() -> None:
    x = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(DropPath(0.0).apply({}, x, train=True), x)


def test_examples_are_dropped_whole_and_survivors_scaled() -> None:
    x = 1.0 + jnp.arange(64 * 6.0).reshape(64, 2, 3)
    ratio = _training(0.25, x) / np.asarray(x)
    per_example = ratio.reshape(64, -1)
    np.testing.assert_allclose(per_example, np.repeat(per_example[:, :1], 6, axis=1), rtol=1e-6)
    kept = per_example[:, 0] > 0
    np.testing.assert_allclose(per_example[kept, 0], 1 / 0.75, rtol=1e-6)
    assert 0 < kept.sum() < 64


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_expectation_is_kept(rate: float) -> None:
    dropped = _training(rate, jnp.ones((40_000, 1)))
    assert (dropped == 0).mean() == pytest.approx(rate, abs=0.01)
    deviation_of_mean = (rate / (1 - rate) / 40_000) ** 0.5
    assert dropped.mean() == pytest.approx(1.0, abs=4 * deviation_of_mean)


def test_the_draw_depends_on_the_key_only() -> None:
    x = jnp.ones((64, 2))
    np.testing.assert_array_equal(_training(0.5, x, seed=1), _training(0.5, x, seed=1))
    assert (_training(0.5, x, seed=1) != _training(0.5, x, seed=2)).any()


def test_the_type_of_the_input_is_kept() -> None:
    assert _training(0.5, jnp.ones((4, 2), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(("depth", "rates"), [(1, [0.0]), (2, [0.0, 0.3]), (4, [0.0, 0.1, 0.2, 0.3])])
def test_rates_rise_linearly_from_zero(depth: int, rates: list[float]) -> None:
    assert linear_rates(0.3, depth) == pytest.approx(rates)


def test_stage_rates_are_those_of_all_blocks_cut_into_stages() -> None:
    rates = stage_rates(0.3, (1, 2, 1))
    assert [len(stage) for stage in rates] == [1, 2, 1]
    assert [rate for stage in rates for rate in stage] == linear_rates(0.3, 4)
