import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from halvit_jax.layers.ffn import FFN, Compact, CompactDense, Mlp, TiedMlp, fold, gelu

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
        result = Mlp(D, F).apply({"params": {"expand": first, "reduce": second}}, jnp.asarray(x), train=False)
    expected = _exact_gelu(x @ first["kernel"] + first["bias"]) @ second["kernel"] + second["bias"]
    np.testing.assert_allclose(result, expected, rtol=1e-10)


def test_tied_mlp_is_its_formula() -> None:
    x, params = _normal(2, 3, D), _tied_params()
    with jax.enable_x64(True):
        result = TiedMlp(D, F).apply({"params": params}, jnp.asarray(x), train=False)
    kernel = params["tied"]["kernel"]
    expected = _exact_gelu(x @ kernel + params["hidden_bias"]) @ kernel.T + params["bias"]
    np.testing.assert_allclose(result, expected, rtol=1e-10)


def test_the_gradient_of_the_tied_kernel_is_the_sum_of_both_uses() -> None:
    x, weights, params = _normal(5, D), _normal(5, D), _tied_params()
    kernel = params["tied"]["kernel"]
    untied_params = {
        "expand": {"kernel": kernel, "bias": params["hidden_bias"]},
        "reduce": {"kernel": kernel.T, "bias": params["bias"]},
    }
    with jax.enable_x64(True):
        tied = jax.grad(lambda p: jnp.sum(weights * TiedMlp(D, F).apply({"params": p}, x, train=True)))(params)
        untied = jax.grad(lambda p: jnp.sum(weights * Mlp(D, F).apply({"params": p}, x, train=True)))(untied_params)
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
    variables = jax.eval_shape(lambda: FFN[name](D, F).init(jax.random.key(0), jnp.ones((1, 1, D)), train=False))
    assert jax.tree.map(lambda leaf: leaf.shape, variables["params"]) == shapes


@pytest.mark.parametrize("name", FFN)
def test_every_kind_computes_in_bfloat16_on_float32_parameters(name: str) -> None:
    layer = FFN[name](D, F, dtype=jnp.bfloat16)
    x = jnp.asarray(_normal(2, 3, D), jnp.float32)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, train=False))
    variables = jax.tree.map(lambda leaf: jnp.asarray(_normal(*leaf.shape), leaf.dtype), shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    result = layer.apply(variables, x, train=False)
    assert (result.dtype, result.shape) == (jnp.bfloat16, x.shape)
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables)
    narrow = FFN[name](D, F).apply(rounded, x.astype(jnp.bfloat16), train=False)
    np.testing.assert_array_equal(np.asarray(result, np.float32), np.asarray(narrow, np.float32))


@pytest.mark.parametrize(("name", "deviation"), [("dense", 0.02), ("tied", (2 / (64 + 256)) ** 0.5)])
def test_initial_values_of_each_kind(name: str, deviation: float) -> None:
    params = FFN[name](64, 256).init(jax.random.key(0), jnp.ones((1, 1, 64)), train=False)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert float(leaf.std()) == pytest.approx(deviation if leaf.ndim == 2 else 0.0, rel=0.05), path


R, HALF = 3, Compact(rank=0.5)


def _compact_variables(branches: int = 2, *, f: int = F, d: int = D, r: int = R) -> dict[str, Any]:
    """Of a compact layer, with statistics as of a network that was trained."""
    rng = np.random.default_rng(0)
    params, stats = {}, {}
    for name, rows, columns in (("first", f, r), ("second", r, d)):
        for i in range(branches):
            kernel = rng.standard_normal((rows, columns)) / math.sqrt(rows)
            norm = {"scale": rng.uniform(0.5, 1.5, columns), "bias": rng.standard_normal(columns)}
            params[f"{name}{i}"] = {"dense": {"kernel": kernel}, "norm": norm}
            stats[f"{name}{i}"] = {"norm": {"mean": rng.standard_normal(columns), "var": rng.uniform(0.5, 2, columns)}}
    return {"params": params, "batch_stats": stats}


def _branches(x: np.ndarray, variables: dict[str, Any], name: str, *, train: bool) -> np.ndarray:
    """sum_i norm_i(W_i x), in evaluation with the averages and in training with the statistics of the batch."""
    total = np.zeros(())
    for branch in (key for key in variables["params"] if key.startswith(name)):
        params, stats = variables["params"][branch], variables["batch_stats"][branch]["norm"]
        y = x @ params["dense"]["kernel"]
        axes = tuple(range(y.ndim - 1))
        mean, var = (y.mean(axes), y.var(axes)) if train else (stats["mean"], stats["var"])
        total = total + (y - mean) / np.sqrt(var + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    return total


def _stats(variables: dict[str, Any]) -> dict[str, Any]:
    return {"batch_stats": variables["batch_stats"]}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("branches", [1, 2, 11])
def test_a_compact_layer_is_its_formula(branches: int, train: bool) -> None:
    x, variables = _normal(2, 5, F), _compact_variables(branches)
    layer = CompactDense(D, Compact(0.5, branches))
    with jax.enable_x64(True):
        apply = jax.jit(lambda v: layer.apply(v, jnp.asarray(x), train=train, mutable=["batch_stats"]))
        result, changed = apply(variables)
    expected = _branches(_branches(x, variables, "first", train=train), variables, "second", train=train)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9)
    moved = jax.tree.map(lambda new, old: bool((np.asarray(new) != old).all()), dict(changed), _stats(variables))
    assert set(jax.tree.leaves(moved)) == {train}


@pytest.mark.parametrize("branches", [1, 2, 11])
def test_a_folded_compact_layer_is_two_matrices_that_compute_the_same(branches: int) -> None:
    f, d, r = 64, 16, 8
    x = np.random.default_rng(1).standard_normal((2, 20, f)).astype(np.float32)
    exact = _compact_variables(branches, f=f, d=d, r=r)
    variables = jax.tree.map(lambda leaf: leaf.astype(np.float32), {"params": {"reduce": exact["params"]}})
    variables |= jax.tree.map(lambda leaf: leaf.astype(np.float32), {"batch_stats": {"reduce": exact["batch_stats"]}})
    before = jax.tree.map(np.array, variables)
    folded = {"params": fold(variables)["params"]["reduce"]}
    assert jax.tree.map(jnp.shape, folded["params"]) == {
        "first": {"kernel": (f, r)},
        "second": {"kernel": (r, d), "bias": (d,)},
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    layer = CompactDense(d, Compact(0.5, branches, folded=True))
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, train=False))
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, shapes)
    inside = {name: tree["reduce"] for name, tree in variables.items()}
    expected = CompactDense(d, Compact(0.5, branches)).apply(inside, x, train=False)
    assert float(jnp.abs(layer.apply(folded, x, train=False) - expected).max() / expected.std()) <= 1e-5


def test_a_folded_compact_layer_cannot_be_trained() -> None:
    layer = CompactDense(D, Compact(0.5, folded=True), name="reduce")
    with pytest.raises(ValueError, match="reduce is folded and cannot be trained"):
        layer.init(jax.random.key(0), jnp.ones((2, F)), train=True)


def test_with_rank_1_a_compact_layer_is_a_dense_one_bit_for_bit() -> None:
    x = jnp.asarray(_normal(2, 3, F), jnp.float32)

    class Dense(nn.Module):
        kind: str

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            if self.kind == "plain":
                return nn.Dense(D, kernel_init=nn.initializers.normal(0.02), name="reduce")(x)
            return CompactDense(D, Compact(1.0, folded=self.kind == "folded"), name="reduce")(x, train=True)

    results = [Dense(kind).init_with_output(jax.random.key(0), x) for kind in ("plain", "compact", "folded")]
    for out, variables in results[1:]:
        assert jax.tree.structure(variables) == jax.tree.structure(results[0][1])
        jax.tree.map(np.testing.assert_array_equal, variables, results[0][1])
        np.testing.assert_array_equal(out, results[0][0])


@pytest.mark.parametrize(("rank", "r"), [(0.5, 3), (0.4, 2), (0.01, 1), (0.99, 6)])
def test_the_rank_is_a_share_of_the_width_and_at_least_1(rank: float, r: int) -> None:
    layer = CompactDense(D, Compact(rank, 1))
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.ones((1, F)), train=False))["params"]
    assert shapes["first0"]["dense"]["kernel"].shape == (F, r)
    assert shapes["second0"]["dense"]["kernel"].shape == (r, D)


@pytest.mark.parametrize(("folded", "count"), [(False, 739_584), (True, 369_024)])
def test_parameters_of_a_compact_layer_of_deit_small(folded: bool, count: int) -> None:
    layer = CompactDense(384, Compact(0.5, folded=folded))
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.ones((1, 1536)), train=False))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


def test_every_parameter_of_a_compact_layer_has_the_gradient_of_the_formula() -> None:
    x, weights, variables = _normal(2, 5, F), _normal(2, 5, D), _compact_variables()
    layer = CompactDense(D, HALF)

    def loss(params: Any) -> jax.Array:
        given = variables | {"params": params}
        return jnp.sum(weights * layer.apply(given, x, train=True, mutable=["batch_stats"])[0])

    with jax.enable_x64(True):
        grads = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(variables["params"]))
    for (path, leaf), grad in zip(
        jax.tree_util.tree_leaves_with_path(variables["params"]), jax.tree.leaves(grads), strict=True
    ):
        assert grad.dtype == np.float64
        moved = []
        for step in (1e-5, -1e-5):
            original = leaf.flat[0]
            leaf.flat[0] = original + step
            z = _branches(x, variables, "first", train=True)
            moved.append(np.sum(weights * _branches(z, variables, "second", train=True)))
            leaf.flat[0] = original
        # What a norm of the next factor takes away again (a constant, and so `first`'s biases) has no gradient.
        assert float(grad.flat[0]) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-5, abs=1e-6), path
        vanishes = "first" in str(path[0]) and str(path[-1]) == "['bias']"
        assert (float(np.abs(grad).max()) > 1e-6) != vanishes, path


def test_a_compact_layer_computes_in_bfloat16_on_float32_variables() -> None:
    x = jnp.asarray(_normal(2, 7, F), jnp.float32)
    exact, rough = (CompactDense(D, HALF, dtype=dtype) for dtype in ("float32", "bfloat16"))
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), _compact_variables())
    (expected, _), (result, changed) = (
        jax.jit(lambda v, layer=layer: layer.apply(v, x, train=True, mutable=["batch_stats"]))(variables)
        for layer in (exact, rough)
    )
    assert result.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(changed)} == {jnp.dtype(jnp.float32)}
    assert 0 < float(jnp.abs(result.astype(jnp.float32) - expected).max()) < 0.1 * float(expected.std())
    shapes = jax.eval_shape(lambda: rough.init(jax.random.key(0), x, train=False))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
