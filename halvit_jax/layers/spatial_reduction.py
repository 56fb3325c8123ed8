"""Spatial-reduction attention (PVT, Wang et al., 2021, arXiv 2102.12122).

Shapes: `b` batch, `u v` height and width of a map, `n` tokens (u v), `m` keys, `h` heads, `d` width, `r` real heads,
`k` width of a head.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from halvit_jax.layers.arrays import widen
from halvit_jax.layers.attention import AttentionMaps, attend
from halvit_jax.layers.conv import Conv
from halvit_jax.layers.ffn import gelu
from halvit_jax.layers.initializers import Dtype, Initializer, normal_02, torch_uniform

REDUCED_EPSILON = 1e-5  # of a reduced map's LayerNorm: PyTorch's default, although the models' other norms have 1e-6


class SpatialReductionAttention(nn.Module):
    """Attention of all tokens over the keys and values of a smaller map.

        y = norm(conv(x));  Q = x Wq;  [K, V] = y Wkv;  out = softmax(Q K^T / sqrt(k)) V Wo

    [b, n, d] -> [b, n, d], tokens of a map row by row. The convolution has kernel and stride `reduction` and ignores
    the remaining rows and columns. If `reduction` is 1, y = x, and other tokens may come before the map's. With
    `pool_size`, the linear attention of PVTv2 (Wang et al., 2021, arXiv 2106.13797, section 3.2), the number of keys is
    the same for all maps:

        y = gelu(norm(conv(pool(x)))), with a convolution of 1x1

    Raises ValueError if the map is smaller than `reduction`.
    """

    width: int  # d
    num_heads: int  # h
    grid: tuple[int, int]  # u, v
    reduction: int = 1
    pool_size: int = 0  # side of the pooled map of keys; 0: use `reduction`
    real_heads: float = 1.0  # as in SelfAttention
    hallucinate: str = "logits"
    attention_impl: str = "auto"
    kernel_init: Initializer = torch_uniform  # of the convolution
    bias_init: Initializer | None = None  # None: PyTorch's default
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = {"kernel_init": normal_02, "dtype": self.dtype}
        maps = AttentionMaps(self.num_heads, self.real_heads, self.hallucinate, name="maps")
        part = maps.real_width(self.width)  # r k
        query = nn.Dense(part, **dense, name="query")(x)
        key_value = nn.Dense(part + self.width, **dense, name="key_value")(self._reduced(x))
        key, value = jnp.split(key_value, (part,), axis=-1)
        return nn.Dense(self.width, **dense, name="output")(attend(self, maps, query, key, value))

    def _reduced(self, x: jax.Array) -> jax.Array:
        """The tokens of the keys and values: [b, n, d] -> [b, m, d]."""
        if self.reduction == 1 and not self.pool_size:
            return x
        x = x.reshape(x.shape[0], *self.grid, self.width)  # [b, u, v, d]
        if self.pool_size:
            x = pool_to(x, self.pool_size)
        elif min(self.grid) < self.reduction:
            raise ValueError(
                f"a map of {self.grid[0]}x{self.grid[1]} tokens cannot be reduced by {self.reduction}; lower "
                "model.reductions or raise model.image_size"
            )
        k = 1 if self.pool_size else self.reduction
        initial = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        conv = Conv(self.width, k, k, padding=0, use_bias=True, **initial, dtype=self.dtype, name="reduction")
        x = conv(x).reshape(x.shape[0], -1, self.width)  # [b, m, d]
        x = nn.LayerNorm(REDUCED_EPSILON, dtype=self.dtype, name="reduction_norm")(x)
        return gelu(x) if self.pool_size else x


def pool_to(x: jax.Array, size: int) -> jax.Array:
    """The means of size x size boxes that cover a map evenly: [b, u, v, d] -> [b, size, size, d].

    Box i covers rows floor(i u / size) to ceil((i + 1) u / size), as in PyTorch. Boxes overlap unless `size` divides
    the map, and repeat single tokens if it is larger. Sums are in float32 at least.
    """
    means = widen(x)
    for axis in (1, 2):
        n = x.shape[axis]
        boxes = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
        means = jnp.stack([lax.slice_in_dim(means, *box, axis=axis).mean(axis) for box in boxes], axis)
    return means.astype(x.dtype)
