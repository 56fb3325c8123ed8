"""Patch embedding and position embedding.

Shapes: `b` batch, `h w` space, `n` tokens, `d` width, `p` patch size.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halvit_jax.layers.arrays import align_last
from halvit_jax.layers.initializers import Dtype, normal_02, torch_uniform, torch_uniform_bias


class PatchEmbed(nn.Module):
    """Cut the image into p x p patches and project each to the width: [b, h, w, c] -> [b, n, d], row by row.

    Equal to a convolution of kernel and stride p, but a reshape and one product, which is fast on all backends. The
    kernel has the convolution's shape (p, p, c, d).
    """

    width: int  # d
    patch_size: int  # p
    dtype: Dtype = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        b, height, width, c = images.shape
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(
                f"{height}x{width} pixels or tokens cannot be cut into patches of {p}x{p} by {self.name}; give images "
                "whose sides the model's strides divide"
            )
        kernel = self.param("kernel", torch_uniform, (p, p, c, self.width))
        bias = self.param("bias", torch_uniform_bias(p * p * c), (self.width,))
        images, kernel, bias = nn.dtypes.promote_dtype(images, kernel, bias, dtype=self.dtype)
        x = images.reshape(b, height // p, p, width // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, (height // p) * (width // p), p * p * c)  # [b, n, p p c]
        x @= kernel.reshape(p * p * c, self.width)
        return x + align_last(bias, x)


class PositionEmbedding(nn.Module):
    """Add a position to every token: learned (normal, 0.02), fixed sine-cosine of the grid, or none.

    x: [b, n, d]; the last u v tokens are those of a grid, row by row. Tokens before them (a class token) have their own
    positions if learned, none if fixed. Learned positions are resampled to another grid.
    """

    kind: str  # a key of POSITIONS
    grid: tuple[int, int]  # u, v of the learned table

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int] | None = None) -> jax.Array:
        grid = grid or self.grid
        d, extra = x.shape[-1], x.shape[1] - math.prod(grid)
        if self.kind == "none":
            return x
        if self.kind == "learned":
            table = self.param("embedding", normal_02, (extra + math.prod(self.grid), d))
            return x + resampled(table, self.grid, grid).astype(x.dtype)[None]
        return x + jnp.asarray(np.pad(sincos_2d(grid, d), ((extra, 0), (0, 0))), x.dtype)[None]


POSITIONS = ("learned", "sincos", "none")


def resampled(
    table: jax.Array, old: tuple[int, int], new: tuple[int, int], *, method: str = "bicubic", antialias: bool = True
) -> jax.Array:
    """Positions [e + n, d] of e other tokens and a grid of n, for another grid: [e + m, d].

    Bicubic and antialiased as in timm. The positions of the other tokens come first and are kept.
    """
    if old == new:
        return table
    extra, d = len(table) - math.prod(old), table.shape[1]
    grid = jax.image.resize(table[extra:].reshape(*old, d), (*new, d), method, antialias=antialias)
    return jnp.concatenate([table[:extra], grid.reshape(-1, d)])


def sincos_2d(grid: tuple[int, int], width: int, *, temperature: float = 10_000.0) -> np.ndarray:
    """Fixed positions of a grid [rows * columns, d]: sines and cosines of the column, then of the row (d / 4 each)."""
    omega = temperature ** -(np.arange(width // 4) / max(width // 4 - 1, 1))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)
