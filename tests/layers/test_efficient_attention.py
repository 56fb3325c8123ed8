import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.layers.efficient_attention import LocalAttention, PooledAttention, halve_map, pool_tokens

D, HEADS = 8, 4


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def _dense(width: int) -> dict[str, np.ndarray]:
    return {"kernel": _normal(D, width), "bias": _normal(width)}


def _norm(n: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(n)
    params = {"scale": rng.uniform(0.5, 1.5, n), "bias": rng.standard_normal(n)}
    return params, {"mean": rng.standard_normal(n), "var": rng.uniform(0.5, 1.5, n)}


def _normalise(x: np.ndarray, params: dict[str, np.ndarray], stats: dict[str, np.ndarray]) -> np.ndarray:
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


def test_tokens_are_pooled_in_a_row_and_the_last_ones_left_out() -> None:
    x = np.arange(11.0)[None, :, None]
    np.testing.assert_array_equal(pool_tokens(jnp.asarray(x), 4)[0, :, 0], [1.5, 5.5])
    np.testing.assert_array_equal(pool_tokens(jnp.asarray(x), 11)[0, :, 0], [5.0])
    with pytest.raises(ValueError, match=r"11 places cannot be pooled 16 to one; .* model.image_size .* model.red"):
        pool_tokens(jnp.asarray(x), 16)


def test_a_halved_map_has_the_means_of_what_there_is() -> None:
    x = _normal(2, 5, 4, 3)
    y = np.asarray(halve_map(jnp.asarray(x, jnp.float32)))
    assert y.shape == (2, 3, 2, 3)
    for u in range(3):
        for v in range(2):
            square = x[:, 2 * u : 2 * u + 2, 2 * v : 2 * v + 2]  # numpy cuts it off at the edge
            np.testing.assert_allclose(y[:, u, v], square.mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("reduction", [1, 2])
def test_pooled_attention_is_its_formula(reduction: int) -> None:
    x, (params, stats) = _normal(2, 10, D), _norm(D)
    dense = {name: _dense(D) for name in ("query", "key", "value", "output")}
    few, variables = x, {"params": dict(dense), "batch_stats": {}}
    if reduction > 1:
        few = _normalise(np.stack([x[:, :4].mean(1), x[:, 4:8].mean(1)], 1), params, stats)
        variables["params"]["pooled_norm"], variables["batch_stats"]["pooled_norm"] = params, stats
    q, k, v = (
        (a @ dense[name]["kernel"] + dense[name]["bias"]).reshape(2, -1, HEADS, D // HEADS)
        for name, a in (("query", x), ("key", few), ("value", few))
    )
    logits = np.einsum("bqhk,bnhk->bhqn", q, k) / np.sqrt(D // HEADS)
    weights = np.exp(logits)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqn,bnhk->bqhk", weights, v).reshape(2, 10, D) @ dense["output"]["kernel"]
    layer = PooledAttention(HEADS, reduction, 1.0, "logits", None, folded=False)
    with jax.enable_x64(True):
        result = jax.jit(lambda v, x: layer.apply(v, x, train=False))(variables, x)
    # The softmax is in float32.
    np.testing.assert_allclose(result, expected + dense["output"]["bias"], atol=1e-5)


@pytest.mark.parametrize("hallucinate", ["logits", "maps"])
def test_half_of_the_heads_need_no_queries_and_keys(hallucinate: str) -> None:
    layer = PooledAttention(HEADS, 2, 0.5, hallucinate, None, folded=False)
    x = jnp.asarray(_normal(2, 16, D), jnp.float32)
    variables = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, train=False))
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes["query"] == shapes["key"] == {"kernel": (D, D // 2), "bias": (D // 2,)}
    assert shapes["value"] == shapes["output"] == {"kernel": (D, D), "bias": (D,)}
    assert shapes["maps"] == {"hallucination": {"across": (2, 2), "within": (3, 3, 1, 2)}}
    variables = jax.tree.map(lambda leaf: np.abs(_normal(*leaf.shape)).astype(np.float32), variables)
    _, kept = jax.jit(lambda v: layer.apply(v, x, train=False, mutable=["intermediates"]))(variables)
    (weights,) = kept["intermediates"]["weights"]
    assert weights.shape == (2, HEADS, 16, 4)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


def test_local_attention_is_its_formula() -> None:
    x, (params, stats) = _normal(1, 3, 4, D), _norm(D)
    kernel, output = _normal(3, 3, 4, D), _normal(1, 1, D, D)
    variables = {
        "params": {"heads": {"conv": {"kernel": kernel}, "norm": params}, "output": {"kernel": output}},
        "batch_stats": {"heads": {"norm": stats}},
    }
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros(x.shape)
    for head in (slice(0, 4), slice(4, 8)):
        for i in range(3):
            for j in range(3):
                y[..., head] += padded[:, i : i + 3, j : j + 4, head] @ kernel[i, j][:, head]
    expected = np.maximum(_normalise(y, params, stats), 0) @ output[0, 0]
    layer = LocalAttention(4, None, folded=False)
    with jax.enable_x64(True):
        result = jax.jit(lambda v, x: layer.apply(v, x, train=False))(variables, x)
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9)
