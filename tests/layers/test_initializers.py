import math

import jax
import jax.numpy as jnp
import pytest

from halvit_jax.layers.initializers import normal_02, torch_uniform, torch_uniform_bias


def test_normal_02_has_a_standard_deviation_of_a_fiftieth() -> None:
    values = normal_02(jax.random.key(0), (200, 200))
    assert float(values.std()) == pytest.approx(0.02, rel=0.02)
    assert float(jnp.abs(values).max()) > 0.06  # not truncated at two standard deviations


@pytest.mark.parametrize("shape", [(64, 100), (3, 3, 16, 32)])
def test_torch_uniform_reaches_one_over_the_root_of_the_inputs(shape: tuple[int, ...]) -> None:
    values = torch_uniform(jax.random.key(0), shape)
    bound = math.prod(shape[:-1]) ** -0.5
    assert 0.98 * bound < float(jnp.abs(values).max()) <= bound


def test_torch_uniform_bias_has_the_bound_of_its_kernel() -> None:
    values = torch_uniform_bias(25)(jax.random.key(0), (1000,))
    assert values.dtype == jnp.float32
    assert 0.19 < float(jnp.abs(values).max()) <= 0.2
    assert abs(float(values.mean())) < 0.02
