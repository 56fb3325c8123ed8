"""The feed-forward layer as a Pallas kernel for TPUs: its hidden activations exist in VMEM only.

    y = gelu(x W1 + b1) W2 + b2      W2 = W1^T in the tied layer, whose one matrix is loaded once for both uses

The backward kernel computes the hidden activations again. Matrices stay in VMEM over the whole grid, and their
gradients are summed there in float32.

Shapes: `b` batch, `n` tokens, `t` tokens of a block, `d` width, `f` hidden.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from halvit_jax.layers.tpu_kernel import NN, NT, TN, compiler_params, dot, entire, images_of_step, padded_bytes, rows

LONGEST_BLOCK = 640  # tokens
HIDDEN = 6  # float32 arrays [t, f] that are alive at once in the backward kernel
TANH = (0.7977175905681536, 0.03679872847953626, -0.00031594866010812434)  # see `gelu_and_slope`

Weights = tuple[jax.Array, ...]  # (W1 [d, f],) tied, or (W1, W2 [f, d])
Biases = tuple[jax.Array, jax.Array]  # b1 [f], b2 [d]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def ffn_in_vmem(x: jax.Array, weights: Weights, biases: Biases, interpret: bool = False) -> jax.Array:
    """gelu(x W1 + b1) W2 + b2: [b, n, d] -> [b, n, d]; sums are float32, products of the type of x."""
    (out,) = _call(_forward_kernel, x, (), weights, biases, (), interpret)
    return out


def needed_bytes(shape: tuple[int, ...], hidden: int, dtype: Any, *, tied: bool) -> int:
    """An estimate of the VMEM of the backward kernel, the larger of the two, for x of this shape [b, n, d]."""
    b, n, d = shape
    tokens = block_of_tokens(n)
    blocks = 3 * padded_bytes((images_of_step(b, tokens), tokens, d), dtype)
    matrices = padded_bytes((d, hidden), dtype) + padded_bytes((d, hidden), jnp.float32)
    # Blocks are fetched one step ahead.
    return 2 * (blocks + (1 if tied else 2) * matrices) + HIDDEN * padded_bytes((tokens, hidden), jnp.float32)


def block_of_tokens(n: int) -> int:
    """All tokens if they are few, else their largest divisor that is a multiple of 16; 0 if there is none."""
    if n <= LONGEST_BLOCK:
        return n
    return max((size for size in range(16, LONGEST_BLOCK + 1, 16) if n % size == 0), default=0)


def gelu_and_slope(h: jax.Array, *, exact: bool) -> tuple[jax.Array, jax.Array]:
    """h Phi(h) and its derivative, in float32.

    A TPU has no instruction for erf, but one for tanh. Unless `exact`, Phi(h) = (1 + tanh(h P(h^2))) / 2 with a
    polynomial P of degree 2, off by at most 1.9e-5: a hundredth of the rounding of bfloat16. The usual tanh
    approximation has P of degree 1 and is off by 1.8e-4. The derivative is off by at most 1.4e-4.
    """
    if exact:
        phi = 0.5 * (1.0 + lax.erf(h * 2**-0.5))
        return h * phi, phi + h * jnp.exp(-0.5 * h * h) * (2 * math.pi) ** -0.5
    c0, c1, c2 = TANH
    square = jnp.minimum(h * h, 50.0)  # beyond it tanh is 1, and P would fall
    t = jnp.tanh(h * (c0 + square * (c1 + square * c2)))
    half = 0.5 * h
    inner = half * (c0 + square * (3 * c1 + square * (5 * c2)))
    return half + half * t, 0.5 + 0.5 * t + inner * (1.0 - t * t)


def _forward(
    x: jax.Array, weights: Weights, biases: Biases, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, Weights, Biases]]:
    return ffn_in_vmem(x, weights, biases, interpret), (x, weights, biases)


def _backward(
    interpret: bool, kept: tuple[jax.Array, Weights, Biases], d_out: jax.Array
) -> tuple[jax.Array, Weights, Biases]:
    x, weights, (b1, b2) = kept
    sums = [weights[0].shape, (1, b1.size), (1, b2.size), *[weights[0].shape] * (len(weights) - 1)]
    d_x, d_w1, d_b1, d_b2, *d_w2 = _call(_backward_kernel, x, (d_out,), weights, (b1, b2), tuple(sums), interpret)
    gradients = d_w1, *[one.T for one in d_w2]  # [d, f] -> [f, d]
    d_weights = tuple(grad.astype(w.dtype) for grad, w in zip(gradients, weights, strict=True))
    return d_x, d_weights, (d_b1[0].astype(b1.dtype), d_b2[0].astype(b2.dtype))


ffn_in_vmem.defvjp(_forward, _backward)


def _call(
    kernel: Any,
    x: jax.Array,
    more: tuple[jax.Array, ...],
    weights: Weights,
    biases: Biases,
    sums: tuple[tuple[int, ...], ...],
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Run a kernel on blocks of tokens of x and of `more`; results: an array like x, and float32 sums."""
    (b, n, d), (_, f) = x.shape, weights[0].shape
    tokens = block_of_tokens(n)
    images = images_of_step(b, tokens)
    vectors = [bias.reshape(1, -1).astype(jnp.float32) for bias in biases]
    arrays, whole = (x, *more), (*weights, *vectors)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums]
    moved = sum(one.size * one.dtype.itemsize for one in (x, *arrays, *whole, *shapes))
    products = 5 if sums else 2
    return pl.pallas_call(
        functools.partial(kernel, tied=len(weights) == 1),
        grid=(b // images, n // tokens),
        in_specs=[rows(images, tokens, d)] * len(arrays) + [entire(one.shape) for one in whole],
        out_specs=[rows(images, tokens, d), *[entire(shape) for shape in sums]],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *shapes],
        compiler_params=compiler_params(needed_bytes(x.shape, f, x.dtype, tied=len(weights) == 1)),
        cost_estimate=pl.CostEstimate(2 * products * b * n * d * f, b * n * f, moved),
        interpret=interpret,
        name=kernel.__name__.strip("_").replace("kernel", "ffn"),
    )(*arrays, *whole)


def _forward_kernel(x: Any, w1: Any, *rest: Any, tied: bool) -> None:
    w2, b1, b2, out = (w1, *rest) if tied else rest
    for i in range(x.shape[0]):
        h = dot(x[i], w1[...]) + b1[...]
        active, _ = gelu_and_slope(h, exact=x.dtype == jnp.float32)
        y = dot(active.astype(x.dtype), w2[...], NT if tied else NN) + b2[...]
        out[i] = y.astype(out.dtype)


def _backward_kernel(x: Any, d_out: Any, w1: Any, *rest: Any, tied: bool) -> None:
    """Sums over the grid: of W1, of the biases, and of W2 transposed. The tied W's two gradients share a sum."""
    w2, b1, _, d_x, d_w1, d_b1, d_b2, *d_w2 = (w1, *rest) if tied else rest
    d_w2t = d_w1 if tied else d_w2[0]

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def _start() -> None:
        for total in (d_w1, d_b1, d_b2, *d_w2):
            total[...] = jnp.zeros(total.shape, total.dtype)

    for i in range(x.shape[0]):
        one, d_y = x[i], d_out[i]
        h = dot(one, w1[...]) + b1[...]
        active, slope = gelu_and_slope(h, exact=x.dtype == jnp.float32)
        d_h = dot(d_y, w2[...], NN if tied else NT) * slope
        d_b1[...] += jnp.sum(d_h, axis=0, keepdims=True)
        d_b2[...] += jnp.sum(d_y.astype(jnp.float32), axis=0, keepdims=True)
        d_h = d_h.astype(x.dtype)
        d_w1[...] += dot(one, d_h, TN)
        d_w2t[...] += dot(d_y, active.astype(x.dtype), TN)
        d_x[i] = dot(d_h, w1[...], NT).astype(d_x.dtype)
