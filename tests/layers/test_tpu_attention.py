"""The kernel in interpret mode against the plain formulation, and compiled ahead of time for TPUs."""

import jax
import pytest
from helpers.kernels import compare, compile_for_tpu, needs_libtpu, normal
from helpers.tiers import tiered

from halvit_jax.layers.attention import attention_weights, weighted_values
from halvit_jax.layers.fused_attention import attention_in_vmem
from halvit_jax.layers.tpu_attention import needed_bytes, short_attention

# Batch, queries, keys, heads, width of a head: odd numbers, a token alone, a last group of heads that fills half of the
# lanes, fewer keys than queries (PVT, Next-ViT), ViT with and without a class token, and larger images.
SHAPES = [
    (3, 17, 5, 5, 32),
    (2, 50, 49, 3, 64),
    (1, 1, 1, 1, 64),
    (4, 49, 49, 3, 128),
    (2, 197, 197, 3, 64),
    (2, 197, 197, 6, 64),
    (1, 197, 197, 12, 64),
    (1, 198, 198, 6, 64),
    (1, 196, 196, 6, 64),
    (1, 577, 577, 3, 64),
    (1, 3136, 49, 1, 64),
    (1, 784, 49, 2, 64),
    (1, 196, 49, 5, 64),
    (1, 50, 50, 8, 64),
    (1, 3136, 49, 3, 32),
    (1, 784, 49, 8, 32),
    (1, 49, 49, 32, 32),
]


@pytest.mark.parametrize("shape", tiered(SHAPES, SHAPES[1:2]), ids=str)
def test_the_kernel_equals_plain_attention_forwards_and_backwards(shape: tuple[int, ...]) -> None:
    b, n, m, h, k = shape

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return weighted_values(attention_weights(query, key, num_heads=h), value)

    arrays = normal(n, (b, n, h * k), (b, m, h * k), (b, m, h * k))
    compare(lambda *given: short_attention(*given, h, True), plain, arrays)


def test_memory_grows_with_tokens_and_maps() -> None:
    small = needed_bytes((8, 197, 384), 197, "bfloat16")
    # Two images of 200 x 384 in bfloat16 (208 with whole registers), seven arrays, twice; six maps of 200 x 256.
    assert small == 2 * 7 * 2 * 208 * 384 * 2 + 6 * 200 * 256 * 4
    assert needed_bytes((8, 577, 384), 577, "bfloat16") > 2 * small


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", "v6e"])
@pytest.mark.parametrize(("b", "n", "m", "h", "k"), [shape for shape in SHAPES if shape[1] in (197, 3136, 577)])
def test_the_kernel_compiles_for_a_tpu(kind: str, b: int, n: int, m: int, h: int, k: int) -> None:
    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention_in_vmem(query, key, value, num_heads=h)

    text = compile_for_tpu(kind, attention, (4 * b, n, h * k), (4 * b, m, h * k), (4 * b, m, h * k))
    assert "forward_attention" in text
    assert "backward_attention" in text
