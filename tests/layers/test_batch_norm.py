from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from halvit_jax.layers.batch_norm import BatchNorm, fold, norm_groups, norms_in_evaluation
from halvit_jax.layers.conv import Conv, ConvNorm

C = 6


def _random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _norm(x: jax.Array, variables: Any, *, train: bool, **fields: Any) -> tuple[jax.Array, Any]:
    return BatchNorm(**fields).apply(variables, x, train=train, mutable=["batch_stats"])


def _norm_variables(x: jax.Array) -> Any:
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    assert {k: v.tolist() for k, v in variables["batch_stats"].items()} == {"mean": [0] * C, "var": [1] * C}
    return {
        "params": {"scale": _random(C, seed=3), "bias": _random(C, seed=4)},
        "batch_stats": {"mean": _random(C, seed=5), "var": jnp.abs(_random(C, seed=6))},
    }


def test_training_normalises_with_the_biased_and_stores_the_unbiased_variance() -> None:
    x = 3 * _random(4, 5, 5, C) + 2
    variables = _norm_variables(x)
    y, changed = _norm(x, variables, train=True)
    exact, old = np.asarray(x, np.float64).reshape(-1, C), variables["batch_stats"]
    mean, var = exact.mean(0), exact.var(0)
    scale, bias = np.asarray(variables["params"]["scale"]), np.asarray(variables["params"]["bias"])
    expected = (exact - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(y.reshape(-1, C), expected, atol=1e-5)
    stats = changed["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.9 * old["mean"] + 0.1 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 * old["var"] + 0.1 * exact.var(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("shape", [(12, C), (12, 5, 5, C)])
def test_groups_are_normalised_each_by_itself_and_the_averages_move_to_the_mean_of_theirs(shape: tuple) -> None:
    """Against NumPy: of PyTorch on three GPUs of four images, and the mean of their averages."""
    x = 3 * _random(*shape) + jnp.arange(12.0).reshape(12, *[1] * (len(shape) - 1))
    variables = _norm_variables(x)
    with norm_groups(3):
        y, changed = _norm(x, variables, train=True)
    parts = np.asarray(x, np.float64).reshape(3, -1, C)
    mean, var = parts.mean(1, keepdims=True), parts.var(1, keepdims=True)
    scale, bias = (np.asarray(variables["params"][name]) for name in ("scale", "bias"))
    scaled = (parts - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(y, scaled.reshape(shape), rtol=1e-4, atol=1e-5)
    old, new = variables["batch_stats"], changed["batch_stats"]
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * mean.mean(0)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * parts.var(1, ddof=1).mean(0), rtol=1e-5)
    apart = [_norm(part, variables, train=True)[0] for part in jnp.split(x, 3)]
    np.testing.assert_allclose(y, jnp.concatenate(apart), rtol=1e-6, atol=1e-6)
    with norm_groups(1):
        np.testing.assert_array_equal(_norm(x, variables, train=True)[0], _norm(x, variables, train=True)[0])
    with norm_groups(3):
        evaluated, _ = _norm(x, variables, train=False)
    np.testing.assert_array_equal(evaluated, _norm(x, variables, train=False)[0])


def test_evaluation_normalises_with_the_averages_and_keeps_them() -> None:
    x = _random(4, 5, 5, C)
    variables = _norm_variables(x)
    y, changed = _norm(x, variables, train=False)
    params, stats = jax.tree.map(np.asarray, (variables["params"], variables["batch_stats"]))
    expected = (np.asarray(x) - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, changed["batch_stats"], stats))


def test_the_gradient_goes_through_mean_and_variance() -> None:
    x, weights = _random(8, C), _random(8, C, seed=7)
    params = _norm_variables(x)["params"]

    def ours(x: jax.Array, params: Any) -> jax.Array:
        return _norm(x, _norm_variables(x) | {"params": params}, train=True)[0]

    def textbook(x: jax.Array, params: Any) -> jax.Array:
        normal = (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5)
        return normal * params["scale"][None] + params["bias"][None]

    a, b = (jax.vjp(f, x, params)[1](weights) for f in (ours, textbook))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), a, b)


def test_statistics_are_float32_when_computing_in_bfloat16() -> None:
    # 257 is no bfloat16 number; a mean kept in that type would miss it.
    x = jnp.full((2, 4, 4, C), 256, jnp.bfloat16).at[0].set(258)
    variables = _norm_variables(x)
    y, changed = _norm(x, variables, train=True, dtype=jnp.bfloat16, momentum=0.0)
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(changed)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(changed["batch_stats"]["mean"], 257)
    np.testing.assert_allclose(changed["batch_stats"]["var"], 32 / 31, rtol=1e-3)


def test_one_row_leaves_the_average_finite() -> None:
    x = _random(1, C)
    y, changed = _norm(x, _norm_variables(x), train=True)
    assert all(bool(jnp.isfinite(a).all()) for a in (y, *jax.tree.leaves(changed)))


@pytest.mark.parametrize("active", [False, True])
def test_frozen_norms_normalise_in_training_with_the_averages(active: bool) -> None:
    x = _random(4, 5, 5, C)
    variables = _norm_variables(x)
    with norms_in_evaluation(active):
        y, changed = _norm(x, variables, train=True)
    expected, kept = _norm(x, variables, train=not active)
    np.testing.assert_array_equal(y, expected)
    jax.tree.map(np.testing.assert_array_equal, changed, kept)
    after, _ = _norm(x, variables, train=True)  # behind the context
    assert bool(jnp.array_equal(after, y)) != active


def test_a_folded_norm_cannot_be_trained() -> None:
    x = _random(2, C)
    for folded in ("merged", "affine"):
        with pytest.raises(ValueError, match="is folded and cannot be trained"):
            BatchNorm(folded=folded).init(jax.random.key(0), x, train=True)


class _Net(nn.Module):
    """A norm behind a convolution, one behind another norm, and one by itself."""

    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        merged, affine = ("merged", "affine") if self.folded else ("", "")
        x = ConvNorm(C, 3, folded=self.folded, name="shortcut")(x, train=False)
        x = BatchNorm(folded=merged, name="shortcut_norm")(x, train=False)
        x = BatchNorm(folded=affine, name="unfused_norm")(x, train=False)
        x = Conv(4, use_bias=self.folded, name="conv1")(x)
        return BatchNorm(folded=merged, name="norm1")(x, train=False)


def test_fold_puts_norms_into_the_convolution_before_them_and_leaves_the_others() -> None:
    x = _random(2, 5, 5, C)
    shapes = jax.eval_shape(_Net().init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)
    folded = fold(variables)
    assert jax.tree.map(np.shape, folded) == jax.tree.map(
        np.shape, jax.eval_shape(_Net(folded=True).init, jax.random.key(0), x)
    )
    np.testing.assert_allclose(_Net(folded=True).apply(folded, x), _Net().apply(variables, x), rtol=1e-4)
