import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.layers.ffn import FFN, Mlp, TiedMlp, gelu

D, F = 6, 14


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def _exact_gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def _tied_params() -> dict[str, np.ndarray]:
    return {"tied": {"kernel": _normal(D, F)}, "hidden_bias": _normal(F), "bias": _normal(D)}


def test_gelu_is_the_exact_one_and_not_the_tanh_approximation() -> None:
    x = np.linspace(-5.0, 5.0, 201)
    with jax.enable_x64(True):
        np.testing.assert_allclose(gelu(jnp.asarray(x)), _exact_gelu(x), atol=1e-12)
        assert np.abs(gelu(jnp.asarray(x)) - jax.nn.gelu(jnp.asarray(x), approximate=True)).max() > 1e-4


def test_mlp_is_its_formula() -> None:
    x = _normal(2, 3, D)
    first, second = {"kernel": _normal(D, F), "bias": _normal(F)}, {"kernel": _normal(F, D), "bias": _normal(D)}
    with jax.enable_x64(True):
        result = Mlp(D, F).apply({"params": {"expand": first, "reduce": second}}, jnp.asarray(x))
    expected = _exact_gelu(x @ first["kernel"] + first["bias"]) @ second["kernel"] + second["bias"]
    np.testing.assert_allclose(result, expected, rtol=1e-10)


def test_tied_mlp_is_its_formula() -> None:
    x, params = _normal(2, 3, D), _tied_params()
    with jax.enable_x64(True):
        result = TiedMlp(D, F).apply({"params": params}, jnp.asarray(x))
    kernel = params["tied"]["kernel"]
    expected = _exact_gelu(x @ kernel + params["hidden_bias"]) @ kernel.T + params["bias"]
    np.testing.assert_allclose(result, expected, rtol=1e-10)


def test_the_gradient_of_the_tied_kernel_is_the_sum_of_both_uses() -> None:
    x, weights, params = _normal(5, D), _normal(5, D), _tied_params()
    kernel = params["tied"]["kernel"]
    twin = {
        "expand": {"kernel": kernel, "bias": params["hidden_bias"]},
        "reduce": {"kernel": kernel.T, "bias": params["bias"]},
    }
    with jax.enable_x64(True):
        tied = jax.grad(lambda p: jnp.sum(weights * TiedMlp(D, F).apply({"params": p}, x)))(params)
        untied = jax.grad(lambda p: jnp.sum(weights * Mlp(D, F).apply({"params": p}, x)))(twin)
    expected = untied["expand"]["kernel"] + untied["reduce"]["kernel"].T
    np.testing.assert_allclose(tied["tied"]["kernel"], expected, rtol=1e-6)
    np.testing.assert_allclose(tied["hidden_bias"], untied["expand"]["bias"], rtol=1e-6)
    np.testing.assert_allclose(tied["bias"], untied["reduce"]["bias"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("dense", {"expand": {"kernel": (D, F), "bias": (F,)}, "reduce": {"kernel": (F, D), "bias": (D,)}}),
        ("tied", {"tied": {"kernel": (D, F)}, "hidden_bias": (F,), "bias": (D,)}),
    ],
)
def test_parameters_of_each_kind(name: str, shapes: dict[str, object]) -> None:
    variables = jax.eval_shape(lambda: FFN[name](D, F).init(jax.random.key(0), jnp.ones((1, 1, D))))
    assert jax.tree.map(lambda leaf: leaf.shape, variables["params"]) == shapes


@pytest.mark.parametrize("name", FFN)
def test_every_kind_computes_in_bfloat16_on_float32_parameters(name: str) -> None:
    layer = FFN[name](D, F, dtype=jnp.bfloat16)
    x = jnp.asarray(_normal(2, 3, D), jnp.float32)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))
    variables = jax.tree.map(lambda leaf: jnp.asarray(_normal(*leaf.shape), leaf.dtype), shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    result = layer.apply(variables, x)
    assert (result.dtype, result.shape) == (jnp.bfloat16, x.shape)
    narrow = FFN[name](D, F).apply(jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables), x.astype(jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(result, np.float32), np.asarray(narrow, np.float32))


@pytest.mark.parametrize(("name", "deviation"), [("dense", 0.02), ("tied", (2 / (64 + 256)) ** 0.5)])
def test_initial_values_of_each_kind(name: str, deviation: float) -> None:
    params = FFN[name](64, 256).init(jax.random.key(0), jnp.ones((1, 1, 64)))["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert float(leaf.std()) == pytest.approx(deviation if leaf.ndim == 2 else 0.0, rel=0.05), path
