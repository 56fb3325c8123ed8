"""Attention of short sequences as a Pallas kernel for TPUs: the map of a head exists in VMEM only.

The forward kernel keeps nothing for the backward pass. The backward kernel computes the maps again from queries and
keys, as the flash attention of Dao et al. (2022, arXiv 2205.14135) does. A sequence is not cut: all of a head's map
fits, so no running maximum is needed.

A grid step has some whole images, so the number of tokens need not be a multiple of anything. Narrow heads lie side by
side in the 128 lanes of a register. Instead of cutting lanes, the lanes of the other heads are set to 0: a product over
128 lanes takes as long as one over 64.

Shapes: `b` batch, `n` tokens, `m` keys, `h` heads, `k` width of a head (d = h k), `g` lanes of a group of heads.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from halvit_jax.layers.tpu_kernel import LANES, NT, TN, compiler_params, dot, images_of_step, padded_bytes, rows

MAPS = 6  # float32 maps that are alive at once in the backward kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def short_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, num_heads: int, interpret: bool = False
) -> jax.Array:
    """softmax(Q K^T / sqrt(k)) V, head by head: [b, n, d], [b, m, d] and [b, m, d] -> [b, n, d].

    Logits, softmax and sums are float32; the weights are rounded to the input's type. k must divide 128.
    """
    return _call(_forward_kernel, (query, key, value), (query,), num_heads, interpret, products=2)[0]


def needed_bytes(shape: tuple[int, ...], keys: int, dtype: Any) -> int:
    """An estimate of the VMEM of the backward kernel, the larger of the two, for queries of this shape [b, n, d]."""
    b, n, d = shape
    images = images_of_step(b, max(n, keys))
    blocks = 3 * padded_bytes((images, n, d), dtype) + 4 * padded_bytes((images, keys, d), dtype)
    return 2 * blocks + MAPS * padded_bytes((keys, n), jnp.float32)  # blocks are fetched one step ahead


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, num_heads: int, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return short_attention(query, key, value, num_heads, interpret), (query, key, value)


def _backward(
    num_heads: int, interpret: bool, kept: tuple[jax.Array, jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, ...]:
    return _call(_backward_kernel, (*kept, d_out), kept, num_heads, interpret, products=5)


short_attention.defvjp(_forward, _backward)


def _call(
    kernel: Any, arrays: tuple[jax.Array, ...], like: tuple[jax.Array, ...], num_heads: int, interpret: bool, *,
    products: int,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Run a kernel on blocks of images; its results have the shapes of `like`."""
    (b, n, d), m = arrays[0].shape, arrays[1].shape[1]
    images = images_of_step(b, max(n, m))
    specs = {tokens: rows(images, tokens, d) for tokens in (n, m)}
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *like))
    return pl.pallas_call(
        functools.partial(kernel, head=d // num_heads),
        grid=(b // images, 1),
        in_specs=[specs[x.shape[1]] for x in arrays],
        out_specs=[specs[x.shape[1]] for x in like],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        compiler_params=compiler_params(needed_bytes((b, n, d), m, arrays[0].dtype)),
        cost_estimate=pl.CostEstimate(2 * products * b * n * m * d, b * num_heads * n * m, moved),
        interpret=interpret,
        name=kernel.__name__.strip("_").replace("kernel", "attention"),
    )(*arrays)


def _forward_kernel(query: Any, key: Any, value: Any, out: Any, *, head: int) -> None:
    for i, lanes, own in _groups(query.shape, head):
        q, k, v = query[i, :, lanes], key[i, :, lanes], value[i, :, lanes]
        total = jnp.zeros(q.shape, jnp.float32)
        for mine in own:
            weights = _softmax(dot(_only(mine, q), k, NT) * head**-0.5, axis=1)  # [n, m]
            total = jnp.where(mine, dot(weights.astype(v.dtype), v), total)
        out[i, :, lanes] = total.astype(out.dtype)


def _backward_kernel(
    query: Any, key: Any, value: Any, d_out: Any, d_query: Any, d_key: Any, d_value: Any, *, head: int
) -> None:
    """With the maps transposed, [m, n], only one of the five products has to transpose its operand."""
    for i, lanes, own in _groups(query.shape, head):
        q, k, v, d_o = query[i, :, lanes], key[i, :, lanes], value[i, :, lanes], d_out[i, :, lanes]
        d_q, d_k, d_v = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
        for mine in own:
            q_own, d_own = _only(mine, q), _only(mine, d_o)
            weights = _softmax(dot(k, q_own, NT) * head**-0.5, axis=0)
            d_weights = dot(v, d_own, NT)
            d_logits = weights * (d_weights - jnp.sum(weights * d_weights, axis=0, keepdims=True))
            d_logits = (d_logits * head**-0.5).astype(q.dtype)
            d_v += dot(weights.astype(v.dtype), d_own)
            d_k += dot(d_logits, q_own)
            d_q = jnp.where(mine, dot(d_logits, k, TN), d_q)
        for ref, grad in ((d_query, d_q), (d_key, d_k), (d_value, d_v)):
            ref[i, :, lanes] = grad.astype(ref.dtype)


def _groups(shape: tuple[int, ...], head: int) -> Iterator[tuple[int, pl.Slice, list[jax.Array]]]:
    """Every image and group of heads of a block: number, lanes, and for each head which of the lanes are its own."""
    images, _, d = shape
    for i in range(images):
        for start in range(0, d, LANES):
            size = min(LANES, d - start)
            lane = lax.broadcasted_iota(jnp.int32, (1, size), 1)
            own = [lane // head == number for number in range(size // head)]
            yield i, pl.ds(start, size), own


def _only(mine: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(mine, x, jnp.zeros_like(x))


def _softmax(logits: jax.Array, *, axis: int) -> jax.Array:
    exponentials = jnp.exp(logits - jnp.max(logits, axis=axis, keepdims=True))
    return exponentials * (1.0 / jnp.sum(exponentials, axis=axis, keepdims=True))
