"""The kernel in interpret mode against the plain formulation, and compiled ahead of time for TPUs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernels import compare, compile_for_tpu, needs_libtpu, normal
from helpers.tiers import tiered

from halvit_jax.layers.arrays import align_last
from halvit_jax.layers.ffn import gelu
from halvit_jax.layers.fused_ffn import ffn_over_rows
from halvit_jax.layers.tpu_ffn import block_of_tokens, ffn_in_vmem, gelu_and_slope, needed_bytes

# Batch, tokens, width, hidden, tied: odd numbers, several blocks of tokens, and the layers of the models.
SHAPES = [
    (3, 5, 24, 40, True),
    (1, 784, 16, 32, False),
    (2, 17, 96, 384, False),
    (2, 197, 192, 768, False),
    (2, 197, 384, 1536, True),
    (2, 197, 384, 1536, False),
    (1, 198, 384, 1536, False),
    (1, 197, 768, 3072, True),
    (1, 197, 768, 3072, False),
    (1, 3136, 64, 512, False),
    (1, 784, 128, 1024, False),
    (1, 3136, 96, 384, False),
    (1, 49, 768, 3072, False),
]


def arrays_of(b: int, n: int, d: int, f: int, tied: bool) -> list[jax.Array]:
    (x,), weights = normal(n, (b, n, d)), normal(d, (d, f), (f, d), scale=d**-0.5)
    return [x, *weights[: 1 if tied else 2], *normal(f, (f,), (d,), scale=0.1)]


@pytest.mark.parametrize("shape", tiered(SHAPES, SHAPES[1:2]), ids=str)
def test_the_kernel_equals_the_plain_layer_forwards_and_backwards(shape: tuple[int, int, int, int, bool]) -> None:
    tied = shape[-1]

    def plain(x: jax.Array, *given: jax.Array) -> jax.Array:
        *weights, b1, b2 = given
        back = weights[0].T if tied else weights[1]
        h = x @ weights[0]
        y = gelu(h + align_last(b1, h)) @ back
        return y + align_last(b2, y)

    def fused(x: jax.Array, *given: jax.Array) -> jax.Array:
        return ffn_in_vmem(x, given[:-2], given[-2:], True)

    compare(fused, plain, arrays_of(*shape))


def test_the_quick_gelu_is_off_by_less_than_stated() -> None:
    h = np.linspace(-12, 12, 4001, dtype=np.float32)
    wide = h.astype(np.float64)
    phi = np.array([0.5 * math.erfc(-one * 2**-0.5) for one in wide])
    slope = phi + wide * np.exp(-0.5 * wide**2) * (2 * np.pi) ** -0.5
    quick, rise = map(np.asarray, gelu_and_slope(jnp.asarray(h), exact=False))
    assert np.abs(quick - wide * phi).max() < 5.5e-5
    apart = np.abs(h) > 1e-2
    assert np.abs(quick[apart] / wide[apart] - phi[apart]).max() < 1.9e-5
    assert np.abs(rise - slope).max() < 1.4e-4
    exact, rise = gelu_and_slope(jnp.asarray(h), exact=True)
    np.testing.assert_allclose(exact, wide * phi, atol=2e-6)
    np.testing.assert_allclose(rise, slope, atol=2e-6)


def test_blocks_of_tokens_divide_them() -> None:
    assert [block_of_tokens(n) for n in (1, 197, 640, 784, 3136, 1000, 641)] == [1, 197, 640, 112, 448, 0, 0]


def test_a_tied_layer_needs_less_memory() -> None:
    sizes = [needed_bytes((8, 197, 384), 1536, "bfloat16", tied=tied) for tied in (True, False)]
    assert sizes[1] - sizes[0] == 2 * 384 * 1536 * (2 + 4)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", "v6e"])
@pytest.mark.parametrize(("b", "n", "d", "f", "tied"), SHAPES[3:])
def test_the_kernel_compiles_for_a_tpu(kind: str, b: int, n: int, d: int, f: int, tied: bool) -> None:
    def layer(x: jax.Array, *given: jax.Array) -> jax.Array:
        return ffn_over_rows(x, given[:-2], given[-2:])

    x, *others = arrays_of(b, n, d, f, tied)
    text = compile_for_tpu(kind, layer, (4 * b, *x.shape[1:]), *[one.shape for one in others])
    assert "forward_ffn" in text
    assert "backward_ffn" in text
