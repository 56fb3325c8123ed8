"""Anchors: boxes of fixed sizes at every position of a pyramid's maps, constants of the canvas.

Anchor k of position (row, column) is centred on (column * stride, row * stride), without half a pixel, and flattened
in the order (row, column, k). Source: mmdetection 3.3 `AnchorGenerator`; Ren et al. 2015 (arXiv 1506.01497).

Shapes: `h w` a map's rows and columns, `k` anchors at a position, `a` = h w k.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

RATIOS = (0.5, 1.0, 2.0)  # height / width
DIVISOR = 32  # an image's padded sides are multiples of it


@dataclasses.dataclass(frozen=True)
class Anchors:
    """Sizes of the anchors at a position: for each ratio and scale an area of (scale * stride)^2 pixels."""

    scales: tuple[float, ...] = (8.0,)
    ratios: tuple[float, ...] = RATIOS
    rounded: bool = False  # corners to whole pixels, as torchvision does

    @property
    def count(self) -> int:
        """Anchors at a position, k."""
        return len(self.scales) * len(self.ratios)

    def base(self, stride: int) -> np.ndarray:
        """The anchors of the position (0, 0), ratios outermost: [k, 4] float32."""
        ratios, scales = np.asarray(self.ratios, np.float64), np.asarray(self.scales, np.float64)
        width = (stride / np.sqrt(ratios)[:, None] * scales).reshape(-1)  # [r, s] -> [k]
        height = (stride * np.sqrt(ratios)[:, None] * scales).reshape(-1)  # [r, s] -> [k]
        corners = np.stack([-width, -height, width, height], axis=-1) / 2
        return (np.round(corners) if self.rounded else corners).astype(np.float32)

    def grid(self, rows: int, columns: int, stride: int, step: tuple[int, int] | None = None) -> np.ndarray:
        """The anchors of a map of `rows` x `columns` positions: [h w k, 4] float32.

        `step` is the distance of two positions, down and across, where it is not the stride.
        """
        down, across = step or (stride, stride)
        x, y = np.arange(columns, dtype=np.float32) * across, np.arange(rows, dtype=np.float32) * down
        shifts = np.zeros((rows, columns, 1, 4), np.float32)
        shifts[..., 0::2], shifts[..., 1::2] = x[None, :, None, None], y[:, None, None, None]
        return (shifts + self.base(stride)).reshape(-1, 4)  # [h, w, k, 4] -> [a, 4]


def retinanet_anchors(*, rounded: bool = False) -> Anchors:
    """Three scales an octave for each of the three ratios (Lin et al. 2017, arXiv 1708.02002, section 4)."""
    return Anchors(scales=tuple(4 * 2 ** (i / 3) for i in range(3)), rounded=rounded)


def inside_flags(size: jax.Array, shapes: Mapping[int, tuple[int, int]], count: int) -> jax.Array:
    """Flags of the anchors whose position is on the image and not on the canvas beside it, for all levels in a row.

    `size` [2] is the image's (rows, columns); its sides are rounded up to multiples of 32 first, because that is how
    far an image alone would be padded. `shapes` {stride: (rows, columns)} are the maps', `count` is k.
    Returns bool [sum of h w k]. An anchor that only reaches over the border is inside.
    """
    padded = -(-size // DIVISOR) * DIVISOR
    flags = []
    for stride, (rows, columns) in shapes.items():
        used = -(-padded // stride)
        inside = (jnp.arange(rows) < used[0])[:, None] & (jnp.arange(columns) < used[1])[None]
        flags.append(jnp.repeat(inside.reshape(-1), count))  # [h, w] -> [a]
    return jnp.concatenate(flags)
