import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiers import tiered

from halvit_jax.layers import attention as attention_module
from halvit_jax.layers.attention import ATTENTION, attention_weights, weighted_values
from halvit_jax.layers.fused_attention import ATTENTION_IMPLS, CHOICES, FUSED_ON, Shapes, choose, padded_attention
from halvit_jax.layers.placement import Place
from halvit_jax.models import create_model

BF16, F32 = jnp.bfloat16, jnp.float32


GPU, CPU = Place("gpu", "NVIDIA H100"), Place("cpu", "cpu")
TPU = Place("tpu", "TPU v5 lite", rows=8)
DEIT_S = Shapes(1024, 197, 197, 6, 64)


@pytest.mark.parametrize(
    ("wanted", "place", "dtype", "head_width", "needs_map", "chosen"),
    [
        ("auto", GPU, BF16, 64, "", "cudnn"),
        ("auto", GPU, jnp.float16, 128, "", "cudnn"),
        ("fused", GPU, BF16, 32, "", "cudnn"),
        ("auto", GPU, F32, 64, "", "xla"),
        ("auto", GPU, BF16, 20, "", "xla"),
        ("auto", GPU, BF16, 136, "", "xla"),
        ("auto", GPU, BF16, 64, "maps are mixed", "xla"),
        ("auto", CPU, BF16, 64, "", "xla"),
        ("xla", GPU, BF16, 64, "", "xla"),
        ("auto", TPU, BF16, 64, "", "pallas"),
        ("fused", TPU, BF16, 32, "", "pallas"),
        ("auto", TPU, jnp.float16, 64, "", "xla"),
        ("auto", TPU, BF16, 48, "", "xla"),
        ("auto", TPU._replace(tensor=2), BF16, 64, "", "xla"),
        ("auto", TPU._replace(kind="TPU v4"), BF16, 64, "", "xla"),
        ("xla", TPU, BF16, 64, "", "xla"),
    ],
)
def test_which_implementation_computes_attention(
    wanted: str, place: Place, dtype: jnp.dtype, head_width: int, needs_map: str, chosen: str
) -> None:
    shapes = DEIT_S._replace(head_width=head_width)
    found = choose(wanted, place=place, dtype=jnp.dtype(dtype), shapes=shapes, needs_map=needs_map)
    assert found == chosen
    assert found in {"xla", *ATTENTION_IMPLS}


@pytest.mark.parametrize(
    ("place", "dtype", "change", "needs_map", "says"),
    [
        (CPU, BF16, {}, "", "platforms gpu, tpu, not cpu"),
        (GPU, F32, {}, "", "bfloat16 or float16, not float32"),
        (GPU, BF16, {"head_width": 20}, "", "multiple of 8 up to 128, not 20"),
        (GPU, BF16, {}, "maps are mixed", "maps are mixed"),
        (TPU, F32, {}, "", r"bfloat16, not float32 \(compute_dtype\)"),
        (TPU, BF16, {"head_width": 48}, "", "divides 128, not 48"),
        (TPU, BF16, {"batch": 1020}, "", "1020 rows do not divide over mesh.data x mesh.fsdp = 8"),
        (TPU, BF16, {"queries": 4096, "keys": 4096}, "", "MiB of the 128 MiB next to the cores of TPU v5 lite"),
        (TPU._replace(tensor=2), BF16, {}, "", "whole matrices, not mesh.tensor=2"),
        (TPU._replace(kind="TPU v4"), BF16, {}, "", "a TPU v5e or newer, not 'TPU v4'"),
    ],
)
def test_impossible_fused_attention_is_refused_by_field(
    place: Place, dtype: jnp.dtype, change: dict[str, int], needs_map: str, says: str
) -> None:
    with pytest.raises(ValueError, match=f"model.attention_impl='fused'.*{says}"):
        choose("fused", place=place, dtype=jnp.dtype(dtype), shapes=DEIT_S._replace(**change), needs_map=needs_map)


def test_every_platform_names_an_implementation_that_there_is() -> None:
    assert set(FUSED_ON.values()) <= ATTENTION_IMPLS.keys()


@pytest.mark.parametrize("tokens", tiered([(197, 197), (49, 49), (50, 7), (1, 1)], [(50, 7)]), ids=str)
def test_fused_attention_equals_plain_attention_forwards_and_backwards(tokens: tuple[int, int]) -> None:
    """In the layout of `jax.nn.dot_product_attention`, which cuDNN's shares."""
    n, m = tokens
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

    monkeypatch.setattr(attention_module, "current", lambda: GPU)
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
