import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.layers.attention import ATTENTION, attention_weights, weighted_values
from halvit_jax.layers.fused_attention import ATTENTION_IMPLS, CHOICES, FUSED_ON, choose, padded_attention
from halvit_jax.models import create_model

BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    ("wanted", "platform", "dtype", "head_width", "needs_map", "chosen"),
    [
        ("auto", "gpu", BF16, 64, "", "cudnn"),
        ("auto", "gpu", jnp.float16, 128, "", "cudnn"),
        ("fused", "gpu", BF16, 32, "", "cudnn"),
        ("auto", "gpu", F32, 64, "", "xla"),
        ("auto", "gpu", BF16, 20, "", "xla"),
        ("auto", "gpu", BF16, 136, "", "xla"),
        ("auto", "gpu", BF16, 64, "maps are mixed", "xla"),
        ("auto", "cpu", BF16, 64, "", "xla"),
        ("auto", "tpu", BF16, 64, "", "xla"),
        ("xla", "gpu", BF16, 64, "", "xla"),
    ],
)
def test_what_attention_is_computed_by(
    wanted: str, platform: str, dtype: jnp.dtype, head_width: int, needs_map: str, chosen: str
) -> None:
    found = choose(wanted, platform=platform, dtype=jnp.dtype(dtype), head_width=head_width, needs_map=needs_map)
    assert found == chosen
    assert found in {"xla", *ATTENTION_IMPLS}


@pytest.mark.parametrize(
    ("platform", "dtype", "head_width", "needs_map", "says"),
    [
        ("cpu", BF16, 64, "", "platforms gpu, not cpu"),
        ("gpu", F32, 64, "", "bfloat16 or float16, not float32"),
        ("gpu", BF16, 20, "", "multiple of 8 up to 128, not 20"),
        ("gpu", BF16, 64, "maps are mixed", "maps are mixed"),
    ],
)
def test_fused_attention_that_cannot_be_names_its_field(
    platform: str, dtype: jnp.dtype, head_width: int, needs_map: str, says: str
) -> None:
    with pytest.raises(ValueError, match=f"model.attention_impl='fused'.*{says}"):
        choose("fused", platform=platform, dtype=jnp.dtype(dtype), head_width=head_width, needs_map=needs_map)


def test_every_platform_names_an_implementation_that_there_is() -> None:
    assert set(FUSED_ON.values()) <= ATTENTION_IMPLS.keys()


@pytest.mark.parametrize(("n", "m"), [(197, 197), (49, 49), (50, 7), (1, 1)])
def test_fused_attention_is_the_plain_one_forwards_and_backwards(n: int, m: int) -> None:
    """In the layout of `jax.nn.dot_product_attention`, which cuDNN's shares."""
    rng = np.random.default_rng(n)
    query = jnp.asarray(rng.standard_normal((2, n, 24)), F32)
    key, value = (jnp.asarray(rng.standard_normal((2, m, 24)), F32) for _ in range(2))

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return weighted_values(attention_weights(query, key, num_heads=3), value)

    def fused(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return padded_attention(query, key, value, num_heads=3, implementation="xla")

    expected, pull = jax.vjp(plain, query, key, value)
    found, pull_fused = jax.vjp(fused, query, key, value)
    for a, b in zip((expected, *pull(expected)), (found, *pull_fused(expected)), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * float(a.std() + 1))


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_is_fused_where_nobody_asks_for_its_map(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def recorded(*args: jax.Array, num_heads: int) -> jax.Array:
        calls.append(num_heads)
        return padded_attention(*args, num_heads=num_heads, implementation="xla")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setitem(ATTENTION_IMPLS, "cudnn", recorded)
    attention = ATTENTION[kind](16, 2, dtype=BF16)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 16)), BF16)
    params = attention.init(jax.random.key(0), x)
    assert not calls
    fused = attention.apply(params, x)
    assert calls == [2]
    plain, kept = attention.apply(params, x, mutable=["intermediates"])
    assert kept["intermediates"]["weights"][0].shape == (2, 2, 5, 5)
    attention.apply(params, x, logits_fn=lambda logits, query: logits)
    attention.apply(params, x, weights_fn=lambda weights: weights)
    ATTENTION[kind](16, 2, dtype=BF16, attention_impl="xla").apply(params, x)
    assert calls == [2]
    np.testing.assert_allclose(fused.astype(F32), plain.astype(F32), atol=0.05)


@pytest.mark.parametrize("name", ["deit_tiny", "mini_deit_tiny", "pvt_tiny", "nextvit_small"])
def test_models_name_the_field_when_it_is_wrong(name: str) -> None:
    with pytest.raises(ValueError, match=r"model.attention_impl='cudnn' is not one of auto, xla, fused"):
        create_model(name, attention_impl="cudnn")
    assert all(create_model(name, attention_impl=choice).attention_impl == choice for choice in CHOICES)


def test_fused_attention_on_a_cpu_is_an_error_that_names_its_field() -> None:
    model = create_model("deit_tiny", attention_impl="fused", depth=1, dtype=BF16)
    images = jnp.zeros((1, 224, 224, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    with pytest.raises(ValueError, match=r"model.attention_impl='fused'.*not cpu"):
        jax.eval_shape(lambda p: model.apply(p, images, train=False), params)
