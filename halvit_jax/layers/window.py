"""Attention in windows (Swin Transformer).

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021,
https://arxiv.org/abs/2103.14030, section 3.2. Attention is within windows of s x s tokens. Every second block first
shifts the map cyclically by half a window, so tokens meet others than before, and masks the pairs that are adjacent
only by the cyclic shift.

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
    """The windows of maps of one size, padded with zeros below and on the right to a multiple of `size`, then shifted.

    The zeros are attended to, as in Swin's detectors. There are none if `size` divides the map.
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
        """Logits [b m, h, n, n], minus 100 for a query and a key from opposite edges of the map."""
        if not self.shift:
            return logits
        parts = self._parts()  # [m, n]
        apart = jnp.where(parts[:, :, None] != parts[:, None, :], MASKED, 0.0).astype(logits.dtype)
        masked = logits.reshape(-1, len(parts), *logits.shape[1:]) + apart[None, :, None]  # [b, m, h, n, n]
        return masked.reshape(logits.shape)

    @property
    def _count(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return math.ceil(self.grid[0] / self.size), math.ceil(self.grid[1] / self.size)

    def _parts(self) -> jax.Array:
        """The part of the map of each token of each window, [m, n]; parts in one window are not adjacent in the map."""
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
