from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halvit_jax.layers.tied import TiedDense

D, F = 6, 10
BACK = TiedDense.project_back


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def _apply(method: Callable[..., jax.Array], kernel: np.ndarray, x: np.ndarray, **fields: object) -> jax.Array:
    layer = TiedDense(*kernel.shape, **fields)
    return layer.apply({"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(x), method=method)


class Pair(nn.Module):
    """Both uses of one kernel, and a second user who is handed the submodule."""

    dtype: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        tied = TiedDense(D, F, dtype=self.dtype, name="tied")
        return Guest(tied)(tied.project_back(jnp.sin(tied.project(x))))


class Guest(nn.Module):
    tied: TiedDense

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.tied.project_back(jnp.sin(self.tied.project(x)))


def test_project_is_x_w_and_project_back_is_h_w_transposed() -> None:
    kernel, x, h = _normal(D, F), _normal(2, 3, D), _normal(2, 3, F)
    with jax.enable_x64(True):
        forward = _apply(TiedDense.project, kernel, x)
        backward = _apply(BACK, kernel, h)
    np.testing.assert_allclose(forward, np.einsum("bnd,df->bnf", x, kernel), rtol=1e-12)
    np.testing.assert_allclose(backward, np.einsum("bnf,df->bnd", h, kernel), rtol=1e-12)


def test_the_kernel_is_one_leaf_for_all_its_users() -> None:
    variables = Pair().init(jax.random.key(0), jnp.ones((2, D)))
    assert jax.tree.map(jnp.shape, variables) == {"params": {"tied": {"kernel": (D, F)}}}


def test_the_gradient_of_the_kernel_is_the_sum_of_its_uses() -> None:
    x, weights = _normal(4, D), _normal(4, D)

    def untied(first: jax.Array, first_t: jax.Array, second: jax.Array, second_t: jax.Array) -> jax.Array:
        y = jnp.sin(x @ first) @ first_t
        return jnp.sum(weights * (jnp.sin(y @ second) @ second_t))

    with jax.enable_x64(True):
        kernel = jnp.asarray(_normal(D, F))
        tied = jax.grad(lambda w: jnp.sum(weights * Pair().apply({"params": {"tied": {"kernel": w}}}, x)))(kernel)
        uses = jax.grad(untied, argnums=(0, 1, 2, 3))(kernel, kernel.T, kernel, kernel.T)
        assert tied.dtype == jnp.float64
        expected = uses[0] + uses[1].T + uses[2] + uses[3].T
    np.testing.assert_allclose(tied, expected, rtol=1e-6, atol=1e-12)


def test_bfloat16_computes_in_bfloat16_on_float32_parameters() -> None:
    layer = TiedDense(D, F, dtype=jnp.bfloat16)
    x = jnp.asarray(_normal(3, D), jnp.float32)
    variables = layer.init(jax.random.key(0), x, method=TiedDense.project)
    kernel = variables["params"]["kernel"]
    assert kernel.dtype == jnp.float32
    for method, given in ((TiedDense.project, x), (BACK, jnp.asarray(_normal(3, F), jnp.float32))):
        matrix = kernel if method is TiedDense.project else kernel.T
        expected = given.astype(jnp.bfloat16) @ matrix.astype(jnp.bfloat16)
        result = layer.apply(variables, given, method=method)
        assert result.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(result, np.float32), np.asarray(expected, np.float32))


def test_without_a_dtype_the_input_decides() -> None:
    kernel, x = _normal(D, F).astype(np.float32), _normal(2, D).astype(np.float32)
    assert _apply(TiedDense.project, kernel, x).dtype == jnp.float32
    with jax.enable_x64(True):
        assert _apply(TiedDense.project, kernel, x.astype(np.float64)).dtype == jnp.float64


def test_in_bfloat16_all_uses_share_one_cast() -> None:
    """So that the kernel's gradient is exchanged between devices once, at half of the untied traffic."""
    module, x = Pair(dtype="bfloat16"), jnp.ones((2, D))
    variables = module.init(jax.random.key(0), x)
    jaxpr = str(jax.make_jaxpr(module.apply)(variables, x))
    assert jaxpr.count(f"bf16[{D},{F}] = convert_element_type") == 1
