"""Attention in windows (Swin Transformer).

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021,
https://arxiv.org/abs/2103.14030, section 3.2. A map is cut into s x s tokens that attend to themselves alone. In every
second block it is first moved by half a window, round the edges, so that tokens meet others than before; pairs that
only the way round has brought together are masked.

Shapes: `b` batch, `u v` height and width of a map, `s` side of a window, `n` tokens of a window (s s), `m` windows of a
map, `h` heads, `d` width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halvit_jax.layers.initializers import normal_02

MASKED = -100.0  # added to the logit of a pair, as released


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of maps of one size: zeros below and on the right up to a multiple of `size`, moved by `shift`.

    The zeros can be attended to, as in Swin's detectors; no image has any where `size` divides the map.
    """

    grid: tuple[int, int]  # u, v
    size: int  # s
    shift: int = 0

    def split(self, x: jax.Array) -> jax.Array:
        """A map [b, u, v, d] -> its windows [b m, n, d]."""
        b, u, v, d = x.shape
        rows, columns = self._count
        x = jnp.pad(x, ((0, 0), (0, rows * self.size - u), (0, columns * self.size - v), (0, 0)))
        x = jnp.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = x.reshape(b, rows, self.size, columns, self.size, d).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, self.size**2, d)

    def join(self, windows: jax.Array) -> jax.Array:
        """The inverse of `split`: [b m, n, d] -> [b, u, v, d]."""
        rows, columns = self._count
        x = windows.reshape(-1, rows, columns, self.size, self.size, windows.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, rows * self.size, columns * self.size, windows.shape[-1])
        x = jnp.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x
        return x[:, : self.grid[0], : self.grid[1]]

    def mask(self, logits: jax.Array) -> jax.Array:
        """Logits [b m, h, n, n], less 100 where query and key come from opposite edges of the map."""
        if not self.shift:
            return logits
        parts = self._parts()  # [m, n]
        apart = jnp.where(parts[:, :, None] != parts[:, None, :], MASKED, 0.0).astype(logits.dtype)
        masked = logits.reshape(-1, len(parts), *logits.shape[1:]) + apart[:, None]  # [b, m, h, n, n]
        return masked.reshape(logits.shape)

    @property
    def _count(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return math.ceil(self.grid[0] / self.size), math.ceil(self.grid[1] / self.size)

    def _parts(self) -> jax.Array:
        """Which part of the map each token of each window is of, [m, n]; a window's parts do not touch in the map."""
        sides = []
        for count in self._count:
            place = np.arange(count * self.size)
            sides.append((place >= len(place) - self.size).astype(np.int32) + (place >= len(place) - self.shift))
        parts = 3 * sides[0][:, None] + sides[1]
        return Windows(parts.shape, self.size).split(jnp.asarray(parts)[None, :, :, None])[..., 0]


class RelativePositionBias(nn.Module):
    """A learned number for each head and each offset of two tokens of a window: () -> [h, n, n] (query, key)."""

    size: int  # s
    num_heads: int  # h

    @nn.compact
    def __call__(self) -> jax.Array:
        table = self.param("table", normal_02, ((2 * self.size - 1) ** 2, self.num_heads))
        return table[offsets(self.size)].transpose(2, 0, 1)


def offsets(size: int) -> np.ndarray:
    """The number, from 0, of the offset of every pair of tokens of a window, [n, n] (query, key)."""
    places = np.indices((size, size)).reshape(2, -1)  # [2, n]
    rows, columns = places[:, :, None] - places[:, None, :] + size - 1
    return rows * (2 * size - 1) + columns
