from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.layers.attention import (
    ATTENTION,
    FLOOR,
    HALLUCINATE,
    AttentionMaps,
    Hallucination,
    SelfAttention,
    SingleHeadAttention,
    TalkingHeads,
    TiedAttention,
    attention_weights,
    weighted_values,
)

B, N, D, H = 2, 5, 12, 3


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def _attend(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """One head after the other, one query after the other."""
    k = D // H
    out = np.zeros_like(value)
    for head in range(H):
        part = slice(head * k, (head + 1) * k)
        for b in range(B):
            for i in range(N):
                logits = key[b, :, part] @ query[b, i, part] / np.sqrt(k)
                weights = np.exp(logits - logits.max())
                out[b, i, part] = weights / weights.sum() @ value[b, :, part]
    return out


def _tied_params(*, bias: bool) -> dict[str, Any]:
    params: dict[str, Any] = {
        name: {"kernel": 0.3 * _normal(D, D, seed=seed)} for seed, name in enumerate(("query_output", "key_value"))
    }
    if bias:
        names = ("query_bias", "key_bias", "value_bias", "output_bias")
        params |= {name: _normal(D, seed=seed) for seed, name in enumerate(names)}
    return params


def _untied(params: dict[str, Any]) -> dict[str, Any]:
    """The matrices of full attention that compute the same as tied ones."""
    wq, wkv = params["query_output"]["kernel"], params["key_value"]["kernel"]
    zero = np.zeros(D)
    bias = [params.get(f"{name}_bias", zero) for name in ("query", "key", "value")]
    return {
        "qkv": {"kernel": np.concatenate([wq, wkv, wkv.T], axis=1), "bias": np.concatenate(bias)},
        "output": {"kernel": wq.T, "bias": params.get("output_bias", zero)},
    }


# The softmax is float32 whatever the rest is, hence 1e-6 where all else would allow 1e-12.
def test_attend_is_softmax_attention_head_by_head() -> None:
    query, key, value = (_normal(B, N, D, seed=seed) for seed in range(3))
    with jax.enable_x64(True):
        weights = attention_weights(jnp.asarray(query), jnp.asarray(key), num_heads=H)
        result = weighted_values(weights, jnp.asarray(value))
    np.testing.assert_allclose(result, _attend(query, key, value), rtol=1e-6, atol=1e-6)


def test_full_attention_is_its_formula() -> None:
    x = _normal(B, N, D)
    params = {
        "qkv": {"kernel": 0.3 * _normal(D, 3 * D), "bias": _normal(3 * D)},
        "output": {"kernel": _normal(D, D), "bias": _normal(D)},
    }
    with jax.enable_x64(True):
        result = SelfAttention(D, H).apply({"params": params}, jnp.asarray(x))
    projected = x @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    attended = _attend(projected[..., :D], projected[..., D : 2 * D], projected[..., 2 * D :])
    expected = attended @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_tied_attention_is_its_formula(bias: bool) -> None:
    x, params = _normal(B, N, D), _tied_params(bias=bias)
    with jax.enable_x64(True):
        result = TiedAttention(D, H, bias=bias).apply({"params": params}, jnp.asarray(x))
    wq, wkv = params["query_output"]["kernel"], params["key_value"]["kernel"]
    query, key, value = (
        y + params.get(f"{name}_bias", 0.0)
        for name, y in (("query", x @ wq), ("key", x @ wkv), ("value", np.einsum("bnf,df->bnd", x, wkv)))
    )
    expected = np.einsum("bnf,df->bnd", _attend(query, key, value), wq) + params.get("output_bias", 0.0)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_of_each_tied_kernel_is_the_sum_of_both_uses(bias: bool) -> None:
    x, weights, params = _normal(B, N, D), _normal(B, N, D, seed=1), _tied_params(bias=bias)
    with jax.enable_x64(True):
        tied = jax.grad(lambda p: jnp.sum(weights * TiedAttention(D, H, bias=bias).apply({"params": p}, x)))(params)
        untied = jax.grad(lambda p: jnp.sum(weights * SelfAttention(D, H).apply({"params": p}, x)))(_untied(params))
    query, key, value = np.split(untied["qkv"]["kernel"], 3, axis=1)
    expected = {"query_output": query + untied["output"]["kernel"].T, "key_value": key + value.T}
    for name, gradient in expected.items():
        np.testing.assert_allclose(tied[name]["kernel"], gradient, rtol=1e-6, atol=1e-6 * np.abs(gradient).max())


@pytest.mark.parametrize(
    ("name", "bias", "shapes"),
    [
        ("full", False, {"qkv": {"kernel": (D, 3 * D)}, "output": {"kernel": (D, D)}}),
        ("full", True, {"qkv": {"kernel": (D, 3 * D), "bias": (3 * D,)}, "output": {"kernel": (D, D), "bias": (D,)}}),
        ("tied", False, {"query_output": {"kernel": (D, D)}, "key_value": {"kernel": (D, D)}}),
        (
            "tied",
            True,
            {"query_output": {"kernel": (D, D)}, "key_value": {"kernel": (D, D)}}
            | dict.fromkeys(("query_bias", "key_bias", "value_bias", "output_bias"), (D,)),
        ),
    ],
)
def test_parameters_of_each_kind(name: str, bias: bool, shapes: dict[str, Any]) -> None:
    layer = ATTENTION[name](D, H, bias=bias)
    variables = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.ones((1, N, D))))
    assert jax.tree.map(lambda leaf: leaf.shape, variables["params"]) == shapes


@pytest.mark.parametrize("name", ATTENTION)
def test_a_block_changes_the_logits_before_and_the_weights_after_the_softmax(name: str) -> None:
    layer, x = ATTENTION[name](D, H, bias=True), _normal(B, N, D)
    params = _tied_params(bias=True) if name == "tied" else _untied(_tied_params(bias=True))
    seen = {}

    def before(logits: jax.Array, query: jax.Array) -> jax.Array:
        seen.update(logits=logits, query=query)
        alone = jnp.where(jnp.arange(N) == 2, 40.0, 0.0).astype(logits.dtype)  # everyone sees token 2 alone
        return 0 * logits + alone[None, None, None]

    def after(weights: jax.Array) -> jax.Array:
        seen["weights"] = weights
        return 2 * weights

    with jax.enable_x64(True):
        out, kept = layer.apply(
            {"params": params}, jnp.asarray(x), logits_fn=before, weights_fn=after, mutable=["intermediates"]
        )
        qkv = _untied(_tied_params(bias=True))
        query, key, value = np.split(x @ qkv["qkv"]["kernel"] + qkv["qkv"]["bias"], 3, axis=-1)
        expected = 2 * value[:, 2] @ qkv["output"]["kernel"] + qkv["output"]["bias"]
    heads = [array.reshape(B, N, H, -1).transpose(0, 2, 1, 3) for array in (query / np.sqrt(D // H), key)]
    np.testing.assert_allclose(seen["query"], heads[0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(seen["logits"], np.einsum("bhik,bhjk->bhij", *heads), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(out, np.repeat(expected[:, None], N, 1), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(kept["intermediates"]["weights"][0], seen["weights"])  # whose rows sum to 1


@pytest.mark.parametrize("bias", [False, True])
def test_mixed_heads_are_sums_of_all(bias: bool) -> None:
    maps, kernel, shift = _normal(B, H, N, N), _normal(H, H), _normal(H)
    params = {"kernel": kernel, "bias": shift} if bias else {"kernel": kernel}
    layer = TalkingHeads(bias)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), maps)["params"]
    assert {name: leaf.shape for name, leaf in shapes.items()} == {name: a.shape for name, a in params.items()}
    with jax.enable_x64(True):
        mixed = layer.apply({"params": params}, jnp.asarray(maps))
    for g in range(H):
        expected = sum(kernel[h, g] * maps[:, h] for h in range(H)) + (shift[g] if bias else 0.0)
        np.testing.assert_allclose(mixed[:, g], expected, rtol=1e-9)
    assert layer.apply({"params": params}, jnp.asarray(maps, jnp.bfloat16)).dtype == jnp.bfloat16


def _primitives(jaxpr: Any) -> list[tuple[str, set[str]]]:
    """(name, types of the inputs) of every operation, those of inner functions too."""
    found = []
    for equation in jaxpr.eqns:
        types = {str(v.aval.dtype) for v in equation.invars if hasattr(v, "aval") and hasattr(v.aval, "dtype")}
        found.append((equation.primitive.name, types))
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            found += _primitives(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("name", ATTENTION)
def test_in_bfloat16_products_are_bfloat16_and_the_softmax_and_parameters_float32(name: str) -> None:
    layer = ATTENTION[name](D, H, bias=True, dtype=jnp.bfloat16)
    x = jnp.asarray(_normal(B, N, D), jnp.float32)
    variables = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(layer.apply, variables, x).dtype == jnp.bfloat16
    primitives = _primitives(jax.make_jaxpr(layer.apply)(variables, x).jaxpr)
    assert {frozenset(types) for kind, types in primitives if kind == "dot_general"} == {frozenset({"bfloat16"})}
    assert {frozenset(types) for kind, types in primitives if kind == "exp"} == {frozenset({"float32"})}


@pytest.mark.parametrize("name", ATTENTION)
def test_tokens_in_another_order_give_the_outputs_in_that_order(name: str) -> None:
    layer, x = ATTENTION[name](D, H, bias=True), _normal(B, N, D).astype(np.float32)
    params = _tied_params(bias=True) if name == "tied" else _untied(_tied_params(bias=True))
    apply, order = jax.jit(layer.apply), np.array([3, 0, 4, 1, 2])
    expected = np.asarray(apply({"params": params}, x))[:, order]
    np.testing.assert_allclose(apply({"params": params}, x[:, order]), expected, atol=1e-4)


def _hallucinated(maps: np.ndarray, params: dict[str, np.ndarray]) -> np.ndarray:
    """Head after head, place after place; beyond the edges there is nothing."""
    b, r, n, m = maps.shape
    across, within = params["across"], params["within"]
    heads = across.shape[1]
    mixed = [sum(across[s, g] * maps[:, s] for s in range(r)) for g in range(heads)]
    out = np.zeros((b, heads, n, m))
    for g in range(heads):
        for i in range(n):
            for j in range(m):
                for u in (-1, 0, 1):
                    for v in (-1, 0, 1):
                        if 0 <= i + u < n and 0 <= j + v < m:
                            out[:, g, i, j] += within[u + 1, v + 1, 0, g] * mixed[g][:, i + u, j + v]
    return out


def _hallucination_params(real: int, heads: int) -> dict[str, np.ndarray]:
    return {"across": _normal(real, heads), "within": _normal(3, 3, 1, heads)}


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _heads(x: np.ndarray, k: int) -> np.ndarray:
    return x.reshape(*x.shape[:2], -1, k).transpose(0, 2, 1, 3)


def _all_weights(query: np.ndarray, key: np.ndarray, k: int, params: dict[str, np.ndarray], place: str) -> np.ndarray:
    logits = np.einsum("bhik,bhjk->bhij", _heads(query, k), _heads(key, k)) / np.sqrt(k)
    if place == "logits":
        return _softmax(np.concatenate([logits, _hallucinated(logits, params)], axis=1))
    weights = _softmax(logits)
    made = np.maximum(_hallucinated(weights, params), 0)
    return np.concatenate([weights, made / np.maximum(made.sum(-1, keepdims=True), FLOOR)], axis=1)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 1, 5, 2), (2, 2, 1, 1)])
def test_hallucination_mixes_across_the_heads_and_then_within_each_map(shape: tuple[int, ...]) -> None:
    maps, params = _normal(*shape), _hallucination_params(shape[1], 2)
    with jax.enable_x64(True):
        result = Hallucination(2).apply({"params": params}, jnp.asarray(maps))
    np.testing.assert_allclose(result, _hallucinated(maps, params), rtol=1e-10, atol=1e-12)


def test_hallucinated_maps_begin_as_sums_of_the_real_ones() -> None:
    maps = _normal(2, 3, 4, 6).astype(np.float32)
    made, variables = Hallucination(50).init_with_output(jax.random.key(0), jnp.asarray(maps))
    across, within = variables["params"]["across"], variables["params"]["within"]
    assert (across.shape, within.shape) == ((3, 50), (3, 3, 1, 50))
    assert 0 <= float(across.min()) < 0.05
    assert 0.62 < float(across.max()) <= 2 / 3
    assert float(across.mean()) == pytest.approx(1 / 3, abs=0.05)
    np.testing.assert_array_equal(within[1, 1], 1)
    assert float(within.sum()) == 50
    np.testing.assert_allclose(made, np.einsum("brnm,rg->bgnm", maps, across), atol=1e-6)


@pytest.mark.parametrize("place", HALLUCINATE)
@pytest.mark.parametrize(("heads", "real"), [(4, 2), (3, 2), (2, 1)])
def test_the_weights_of_all_heads_are_their_formula_with_the_real_heads_first(
    heads: int, real: int, place: str
) -> None:
    k, n, m = 4, 5, 7  # fewer queries than keys, as where the keys are of reduced space
    query, key = _normal(B, n, real * k), _normal(B, m, real * k, seed=1)
    params = _hallucination_params(real, heads - real)
    layer = AttentionMaps(heads, 0.5, place)
    assert (layer.real, layer.real_width(heads * k)) == (real, real * k)
    with jax.enable_x64(True):
        weights = jax.jit(layer.apply)({"params": {"hallucination": params}}, jnp.asarray(query), jnp.asarray(key))
    weights = np.asarray(weights)
    assert weights.shape == (B, heads, n, m)
    np.testing.assert_allclose(weights, _all_weights(query, key, k, params, place), rtol=1e-5, atol=1e-6)
    assert float(weights.min()) >= 0
    sums = weights.sum(-1)
    cut_off = (sums == 0) if place == "maps" else np.zeros_like(sums, bool)
    np.testing.assert_allclose(sums[~cut_off], 1, atol=1e-6)
    assert cut_off.mean() < 0.5


def test_an_all_zero_hallucinated_map_has_no_nan_gradient() -> None:
    layer, params = AttentionMaps(2, 0.5, "maps"), {"across": -np.ones((1, 1)), "within": np.ones((3, 3, 1, 1))}
    params = jax.tree.map(np.float32, params)
    query, key = jnp.asarray(_normal(1, 3, 4), jnp.float32), jnp.asarray(_normal(1, 5, 4), jnp.float32)

    def first_column(params: Any, query: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = layer.apply({"params": {"hallucination": params}}, query, key)
        return weights[..., 0].sum(), weights

    grads, weights = jax.jit(jax.grad(first_column, argnums=(0, 1), has_aux=True))(params, query)
    assert not weights[:, 1].any()
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("heads", "share", "real"),
    [(3, 0.5, 2), (6, 0.5, 3), (1, 0.5, 1), (5, 0.5, 3), (20, 0.55, 11), (6, 1 / 3, 2), (7, 0.01, 1), (7, 1.0, 7)],
)
def test_real_heads_are_a_share_rounded_up(heads: int, share: float, real: int) -> None:
    assert AttentionMaps(heads, share).real == real


@pytest.mark.parametrize("place", HALLUCINATE)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_with_half_of_the_heads_real_is_its_formula(name: str, place: str) -> None:
    x, k, part = _normal(B, N, D), D // H, 2 * (D // H)  # two real heads of three
    made = _hallucination_params(2, 1)
    params = _tied_params(bias=True)
    params |= {"query_bias": params["query_bias"][:part], "key_bias": params["key_bias"][:part]}
    wq, wkv = params["query_output"]["kernel"], params["key_value"]["kernel"]
    query = x @ wq[:, :part] + params["query_bias"]
    key = x @ wkv[:, :part] + params["key_bias"]
    value = x @ wkv.T + params["value_bias"]
    averaged = _all_weights(query, key, k, made, place) @ _heads(value, k)
    expected = averaged.transpose(0, 2, 1, 3).reshape(B, N, D) @ wq.T + params["output_bias"]
    if name == "full":
        bias = np.concatenate([params[f"{part}_bias"] for part in ("query", "key", "value")])
        qkv = np.concatenate([wq[:, :part], wkv[:, :part], wkv.T], axis=1)
        params = {"qkv": {"kernel": qkv, "bias": bias}, "output": {"kernel": wq.T, "bias": params["output_bias"]}}
    params["maps"] = {"hallucination": made}
    layer = ATTENTION[name](D, H, bias=True, real_heads=0.5, hallucinate=place)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.ones((1, N, D))))["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    weights = _normal(B, N, D, seed=1)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        result = layer.apply({"params": params}, jnp.asarray(x))
        return jnp.sum(weights * result), result

    with jax.enable_x64(True):
        grads, result = jax.jit(jax.grad(loss, has_aux=True))(params)
    grads = jax.tree.map(np.asarray, grads)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    assert [leaf.dtype for leaf in jax.tree.leaves(grads)] == [np.float64] * len(jax.tree.leaves(params))
    assert all(0 < np.abs(leaf).max() < np.inf for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ATTENTION)
def test_with_all_heads_real_nothing_is_hallucinated(name: str) -> None:
    x = jnp.asarray(_normal(B, N, D), jnp.float32)
    plain, all_real = ATTENTION[name](D, H), ATTENTION[name](D, H, real_heads=1.0, hallucinate="maps")
    (out, ours), (same, params) = (layer.init_with_output(jax.random.key(0), x) for layer in (plain, all_real))
    assert jax.tree.structure(ours) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, ours, params)
    np.testing.assert_array_equal(out, same)


@pytest.mark.parametrize("place", HALLUCINATE)
def test_before_sees_the_real_heads_and_after_all(place: str) -> None:
    layer, x, seen = SelfAttention(D, H, real_heads=0.5, hallucinate=place), np.float32(_normal(B, N, D)), {}

    def before(logits: jax.Array, query: jax.Array) -> jax.Array:
        seen.update(logits=logits.shape, query=query.shape)
        return 0 * logits + jnp.where(jnp.arange(N) == 2, 40.0, 0.0).astype(logits.dtype)[None, None, None]

    def after(weights: jax.Array) -> jax.Array:
        seen["shape"] = weights.shape
        return jnp.where(jnp.abs(weights[..., 2:3] - 1) < 1e-4, 0.0, jnp.nan) + weights

    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))
    params = jax.tree.map(lambda leaf: np.float32(np.abs(_normal(*leaf.shape))), shapes)
    params["params"]["maps"]["hallucination"]["within"] = np.float32(
        np.pad(np.ones((1, 1, 1, 1)), ((1, 1), (1, 1), (0, 0), (0, 0)))
    )
    out = jax.jit(lambda p: layer.apply(p, x, logits_fn=before, weights_fn=after))(params)
    assert (seen["logits"], seen["query"]) == ((B, 2, N, N), (B, 2, N, D // H))
    assert seen["shape"] == (B, 3, N, N)
    assert bool(jnp.isfinite(out).all())  # what is changed before, the made heads follow


@pytest.mark.parametrize("place", HALLUCINATE)
@pytest.mark.parametrize("name", ATTENTION)
def test_in_bfloat16_hallucinated_maps_are_close_on_float32_parameters(name: str, place: str) -> None:
    x = jnp.asarray(_normal(B, N, D), jnp.float32)
    exact, layer = (
        ATTENTION[name](D, H, real_heads=0.5, hallucinate=place, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    variables = jax.tree.map(lambda leaf: np.float32(np.abs(_normal(*leaf.shape))) / 4, shapes)
    expected = jax.jit(exact.apply)(variables, x)
    result, kept = jax.jit(lambda v: layer.apply(v, x, mutable=["intermediates"]))(variables)
    assert result.dtype == jnp.bfloat16
    assert 0 < float(jnp.abs(result.astype(jnp.float32) - expected).max()) < 0.05 * float(expected.std())
    np.testing.assert_allclose(kept["intermediates"]["weights"][0].astype(jnp.float32).sum(-1), 1, atol=2e-2)
    primitives = _primitives(jax.make_jaxpr(layer.apply)(variables, x).jaxpr)
    assert {frozenset(types) for kind, types in primitives if kind == "exp"} == {frozenset({"float32"})}


P, K, C = 6, 4, 10


def _single_head_variables() -> dict[str, Any]:
    """Random values, with statistics that a norm can have."""
    layer = SingleHeadAttention(P, K)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.ones((B, 2, 3, C)), train=False))
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([np.abs(_normal(*leaf.shape, seed=seed)) / 2 for seed, leaf in enumerate(leaves)])


def _batch_norm(x: np.ndarray, params: Any, stats: Any) -> np.ndarray:
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


def test_single_head_attention_is_its_formula() -> None:
    x, variables = _normal(B, 2, 3, C), _single_head_variables()
    with jax.enable_x64(True):
        result = SingleHeadAttention(P, K).apply(variables, jnp.asarray(x), train=False)
    params, stats = variables["params"], variables["batch_stats"]
    expected = np.zeros((B, 2, 3, C))
    for b in range(B):
        mixed = x[b, ..., :P]
        mixed = (mixed - mixed.mean()) / np.sqrt(mixed.var() + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
        qkv = _batch_norm(mixed @ params["qkv"]["conv"]["kernel"][0, 0], params["qkv"]["norm"], stats["qkv"]["norm"])
        query, key, value = np.split(qkv.reshape(6, -1), [K, 2 * K], axis=1)
        weights = np.exp(query @ key.T / np.sqrt(K))
        mixed = (weights / weights.sum(1, keepdims=True) @ value).reshape(2, 3, P)
        out = np.maximum(np.concatenate([mixed, x[b, ..., P:]], axis=-1), 0) @ params["output"]["conv"]["kernel"][0, 0]
        expected[b] = _batch_norm(out, params["output"]["norm"], stats["output"]["norm"])
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_single_head_attention_begins_as_nothing_and_has_these_parameters() -> None:
    layer, x = SingleHeadAttention(P), _normal(B, 2, 3, C).astype(np.float32)
    variables = jax.jit(lambda: layer.init(jax.random.key(0), x, train=False))()
    norm = {"scale": (C,), "bias": (C,)}
    wide = 16 + 16 + P
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "norm": {"scale": (P,), "bias": (P,)},
        "qkv": {"conv": {"kernel": (1, 1, P, wide)}, "norm": {"scale": (wide,), "bias": (wide,)}},
        "output": {"conv": {"kernel": (1, 1, C, C)}, "norm": norm},
    }
    assert not jax.jit(lambda v: layer.apply(v, x, train=False))(variables).any()


def test_single_head_attention_in_bfloat16_has_softmax_and_parameters_in_float32() -> None:
    layer = SingleHeadAttention(P, dtype=jnp.bfloat16)
    x = jnp.asarray(_normal(B, 2, 3, C), jnp.bfloat16)
    variables = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, train=False))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        return layer.apply(variables, x, train=False)

    assert jax.eval_shape(apply, variables, x).dtype == jnp.bfloat16
    primitives = _primitives(jax.make_jaxpr(apply)(variables, x).jaxpr)
    assert {frozenset(types) for kind, types in primitives if kind == "dot_general"} == {frozenset({"bfloat16"})}
    assert {frozenset(types) for kind, types in primitives if kind == "exp"} == {frozenset({"float32"})}
