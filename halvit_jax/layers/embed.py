"""Images into tokens, and where each token stands.

Shapes: `b` batch, `h w` space, `n` tokens, `d` width, `p` patch size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halvit_jax.layers.initializers import Dtype, normal_02, torch_uniform, torch_uniform_bias


class PatchEmbed(nn.Module):
    """Cut the image into p x p patches and project each to the width: [b, h, w, c] -> [b, n, d], row by row.

    The same map as a convolution of kernel and stride p, written as a reshape and one product, which is also how it is
    fast everywhere. The kernel has the convolution's shape (p, p, c, d).
    """

    width: int  # d
    patch_size: int  # p
    dtype: Dtype = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        b, height, width, c = images.shape
        p = self.patch_size
        kernel = self.param("kernel", torch_uniform, (p, p, c, self.width))
        bias = self.param("bias", torch_uniform_bias(p * p * c), (self.width,))
        images, kernel, bias = nn.dtypes.promote_dtype(images, kernel, bias, dtype=self.dtype)
        x = images.reshape(b, height // p, p, width // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, (height // p) * (width // p), p * p * c)  # [b, n, p p c]
        return x @ kernel.reshape(p * p * c, self.width) + bias


class Position(nn.Module):
    """Add a position to every token: learned (normal, 0.02), fixed sine-cosine of the grid, or none.

    x: [b, n, d], of which the last grid[0] * grid[1] tokens are the image's, row by row; tokens before them (a class
    token) get a position of their own when learned, none when fixed.
    """

    kind: str  # a key of POSITIONS
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, d = x.shape[1:]
        if self.kind == "none":
            return x
        if self.kind == "learned":
            return x + self.param("embedding", normal_02, (n, d)).astype(x.dtype)
        table = sincos_2d(self.grid, d)
        extra = n - table.shape[0]
        return x + jnp.asarray(np.pad(table, ((extra, 0), (0, 0))), x.dtype)


POSITIONS = ("learned", "sincos", "none")


def sincos_2d(grid: tuple[int, int], width: int, *, temperature: float = 10_000.0) -> np.ndarray:
    """Fixed positions of a grid [rows * columns, d]: sines and cosines of the column, then of the row (d / 4 each)."""
    omega = temperature ** -(np.arange(width // 4) / max(width // 4 - 1, 1))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)
