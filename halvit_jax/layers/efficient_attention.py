"""The attention layers of Next-ViT, MHCA and E-MHSA, and its pooling.

Li et al., "Next-ViT", 2022, https://arxiv.org/abs/2207.05501, section 3.

Shapes: `b` batch, `u v` height and width of a map, `d` channels, `n` tokens, `m` pooled tokens, `k` width of a head.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.attention import AttentionMaps, attend
from halvit_jax.layers.batch_norm import BatchNorm
from halvit_jax.layers.conv import Conv, ConvNorm
from halvit_jax.layers.initializers import Dtype, normal_02


class LocalAttention(nn.Module):
    """Multi-head convolutional attention: relu(norm(x * K)) W, a head being a group of K, [b, u, v, d] -> the same."""

    head_width: int
    dtype: Dtype
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        width, init = x.shape[-1], {"kernel_init": normal_02, "dtype": self.dtype}
        heads = ConvNorm(width, 3, groups=width // self.head_width, folded=self.folded, **init, name="heads")
        return Conv(width, **init, name="output")(nn.relu(heads(x, train=train)))


class PooledAttention(nn.Module):
    """Efficient multi-head self-attention, with keys and values from fewer tokens: [b, n, d] -> [b, n, d].

        pooled = norm(pool(x))  if reduction > 1, else x;    out = softmax(x Wq (pooled Wk)^T / sqrt(k)) pooled Wv Wo

    A pool is `reduction` squared consecutive tokens in row-major order, not a square of the map.
    """

    num_heads: int
    reduction: int
    real_heads: float
    hallucinate: str
    dtype: Dtype
    folded: bool
    attention_impl: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        width, pooled = x.shape[-1], x
        if self.reduction > 1:
            folded = "affine" if self.folded else ""
            pooled = pool_tokens(x, self.reduction**2)
            pooled = BatchNorm(dtype=self.dtype, folded=folded, name="pooled_norm")(pooled, train=train)
        maps = AttentionMaps(self.num_heads, self.real_heads, self.hallucinate, name="maps")
        dense = functools.partial(nn.Dense, kernel_init=normal_02, dtype=self.dtype)
        part = maps.real_width(width)
        query, key = dense(part, name="query")(x), dense(part, name="key")(pooled)
        value = dense(width, name="value")(pooled)
        return dense(width, name="output")(attend(self, maps, query, key, value))


def halve_map(x: jax.Array) -> jax.Array:
    """The mean of each 2x2 square, cut off at an odd edge: [b, u, v, d] -> [b, u/2, v/2, d]."""
    b, u, v, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, u % 2), (0, v % 2), (0, 0)), mode="edge")  # a doubled row has the same mean
    return x.reshape(b, -(-u // 2), 2, -(-v // 2), 2, d).mean((2, 4))  # [b, u/2, 2, v/2, 2, d]


def pool_tokens(x: jax.Array, size: int) -> jax.Array:
    """The mean of each `size` consecutive tokens, without the rest at the end: [b, n, d] -> [b, m, d].

    Raises:
        ValueError: fewer than `size` tokens.
    """
    b, n, d = x.shape
    if n < size:
        raise ValueError(
            f"a map of {n} places cannot be pooled {size} to one; raise model.image_size or lower model.reductions"
        )
    count = n // size
    return x[:, : count * size].reshape(b, count, size, d).mean(2)  # [b, m, size, d]
