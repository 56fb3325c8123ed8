"""RoIAlign: the bilinear samples of a box's bins, averaged (He et al. 2017, arXiv 1703.06870, section 3).

Sample points form a grid and bilinear weights are products, so the operator is separable and linear in the map:

    out = A_y F A_x^T,   A_y [p, h], A_x [p, w],   A[i, j] = mean over the samples x of bin i of hat(x - j),

with hat(t) = max(0, 1 - |t|). `axis_weights` computes A. It is exact for any number of samples, because the samples of
a bin are more than half a pixel apart, so at most four of them reach a pixel. There is no gradient to the boxes.

Two formulations of the same sums, of a pyramid's maps at once:

- `dense`: two matrix products for each level, with weights of 0 for the boxes of other levels. No gather, and no
  scatter in the gradient; work grows with the maps.
- `window`: a box of the level l < last covers less than (2 * finest / stride of the first)^2 pixels of its map,
  whatever its shape, so the pixels it needs are gathered and multiplied once. Less work on large maps.

`FORMULATIONS` and `DENSE_PIXELS` are the one switch. Sources: mmdetection 3.3 `SingleRoIExtractor`, torchvision
`roi_align`; their `sampling_ratio=0` is `samples=0` here.

Shapes: `n` boxes, `p` bins a side, `h w` a map, `c` channels, `q` window pixels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from halvit_jax.layers.arrays import align_last

FINEST = 56.0  # a box of side below 2 * FINEST is pooled from the first level, of side below 4 * FINEST from the second
REACH = 6  # candidates a pixel looks at: at most four samples reach it, one more on each side for rounding
CHUNK = 64  # boxes whose windows are in memory at a time
DENSE_PIXELS = 80 * 80  # up to which size of the first map the dense form is the faster one where windows are allowed


def roi_align(
    maps: Mapping[int, jax.Array],
    boxes: jax.Array,
    *,
    bins: int,
    samples: int = 0,
    aligned: bool = True,
    level_inside: bool = True,
    formulation: str | None = None,
) -> jax.Array:
    """The features of boxes in a pyramid of one image: {stride: [h, w, c]}, [n, 4] -> [n, p, p, c], p = bins.

    Boxes are in pixels of the canvas. The level of a box follows its size, see `roi_level`. `samples` is the number
    of samples a bin and axis, 0 for as many as the bin has pixels; `aligned` shifts by half a pixel, without it a box
    has at least one pixel a side. A sample more than one pixel outside of the map counts 0; a box without samples
    gives 0. `formulation` defaults to the backend's.
    """
    boxes = lax.stop_gradient(boxes.astype(jnp.float32))
    strides = sorted(maps)
    levels = [maps[stride] for stride in strides]
    if not boxes.shape[0]:
        return jnp.zeros((0, bins, bins, levels[0].shape[-1]), levels[0].dtype)
    if formulation is None:
        small = math.prod(levels[0].shape[:2]) <= DENSE_PIXELS
        formulation = "dense" if small else FORMULATIONS.get(jax.default_backend(), "window")
    level = roi_level(boxes, len(strides), inside=level_inside)
    # Everything in pixels of the box's own level, whose first pixel is at 0.
    scaled = boxes / jnp.asarray(strides, jnp.float32)[level][:, None] - (0.5 if aligned else 0.0)
    length = jnp.maximum(scaled[:, 2:] - scaled[:, :2], 0.0 if aligned else 1.0)  # (width, height)
    axes = []
    for axis, i in ((0, 1), (1, 0)):  # rows and y, columns and x
        sizes = [values.shape[axis] for values in levels]
        start, reach, size = scaled[:, i], length[:, i], jnp.asarray(sizes, jnp.float32)[level]
        weights = axis_weights(start, reach, bins, size, samples=samples, at=jnp.arange(max(sizes)))
        first = jnp.clip(jnp.floor(start), 0, size - 1).astype(jnp.int32)
        last = jnp.clip(jnp.floor(start + reach) + 1, 0, size - 1).astype(jnp.int32)
        axes.append(Axis(weights, first, last))
    return ROI_ALIGN_IMPLS[formulation](levels, strides, level, *axes)


def roi_level(boxes: jax.Array, levels: int, *, inside: bool = True) -> jax.Array:
    """floor(log2(sqrt(w h) / 56 + 1e-6)) between 0 and levels - 1: [..., 4] -> int32 [...].

    `inside=False` adds the 1e-6 to the logarithm instead (torchvision). Compared with powers of two, which is exact.
    """
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    ratio = jnp.sqrt(jnp.maximum(width * height, 0)) / FINEST
    ratio = ratio + 1e-6 if inside else ratio * 2**1e-6
    powers = jnp.asarray([2.0**i for i in range(1, levels)], jnp.float32)
    return (ratio[..., None] >= align_last(powers, ratio[..., None])).sum(-1, dtype=jnp.int32)


class Axis(NamedTuple):
    """Interpolation weights of boxes for the rows, or the columns, of the maps of their levels."""

    weights: jax.Array  # [n, p, most rows of any map]
    first: jax.Array  # [n] int32: the pixels from here ...
    last: jax.Array  # [n] ... to here have all weights that are not 0


def axis_weights(
    start: jax.Array,
    length: jax.Array,
    bins: int,
    size: int | jax.Array,
    *,
    samples: int = 0,
    at: jax.Array | None = None,
) -> jax.Array:
    """The weight of each pixel of an axis in each bin of an interval: [...], [...] -> [..., p, size].

    The interval is [start, start + length] in coordinates where pixel j is at j. It is cut into `bins`, each sampled
    at `samples` points (0: ceil(length / bins)). Samples outside of [-1, size] count 0, the others are moved into
    [0, size - 1]. With `at` [q], the pixels asked for, `size` may be an array [...]: -> [..., p, q].
    """
    start, length = start[..., None, None], length[..., None, None]  # [..., 1, 1]
    pixel = align_last((jnp.arange(size) if at is None else at).astype(jnp.float32), start)
    size = align_last(jnp.asarray(size, jnp.float32)[..., None, None], start)
    width = length / bins
    count = jnp.ceil(width) if samples == 0 else jnp.full_like(width, samples)
    origin = start + align_last(jnp.arange(bins, dtype=jnp.float32)[:, None], width) * width  # [..., p, 1]
    step = width / jnp.maximum(count, 1)
    if samples:
        first, reach = jnp.zeros_like(origin + pixel), samples
    else:
        # The first sample that may be within a pixel of this one.
        safe = jnp.where(step > 0, step, 1)
        first, reach = jnp.maximum(jnp.floor((pixel - 1 - origin) / safe - 0.5), 0), REACH
    total = jnp.zeros_like(first)
    for i in range(reach):
        k = first + i
        x = origin + (k + 0.5) * step
        hat = jnp.maximum(1 - jnp.abs(jnp.clip(x, 0, size - 1) - pixel), 0)
        total += jnp.where((k < count) & (x >= -1) & (x <= size), hat, 0)
    return total / jnp.maximum(count, 1)


def dense(maps: list[jax.Array], strides: list[int], level: jax.Array, rows: Axis, columns: Axis) -> jax.Array:
    """Two matrix products a level, over all of its map."""
    out = jnp.zeros((), maps[0].dtype)
    for i, values in enumerate(maps):
        own = jnp.where((level == i)[:, None, None], rows.weights[..., : values.shape[0]], 0).astype(values.dtype)
        across = columns.weights[..., : values.shape[1]].astype(values.dtype)
        out += jnp.einsum("nqw,npwc->npqc", across, jnp.einsum("nph,hwc->npwc", own, values))
    return out


def window(maps: list[jax.Array], strides: list[int], level: jax.Array, rows: Axis, columns: Axis) -> jax.Array:
    """The pixels a box needs as one list, and one product with their weights [p p, q]."""
    shapes = [values.shape[:2] for values in maps]
    q, channels = window_pixels(shapes, strides[0]), maps[0].shape[-1]
    flat = jnp.concatenate([values.reshape(-1, channels) for values in maps])  # [all pixels, c]
    starts = jnp.asarray([sum(math.prod(shape) for shape in shapes[:i]) for i in range(len(maps))])[level]
    widths = jnp.asarray([shape[1] for shape in shapes])[level]

    def pool(rows: Axis, columns: Axis, start: jax.Array, width: jax.Array) -> jax.Array:
        across = columns.last - columns.first + 1
        row, column = rows.first + jnp.arange(q) // across, columns.first + jnp.arange(q) % across
        used = row <= rows.last
        row = jnp.where(used, row, rows.first)
        weights = jnp.where(used, rows.weights[:, None, row] * columns.weights[None, :, column], 0)  # [p, p, q]
        pixels = flat[start + row * width + column]  # [q, c]
        return jnp.einsum("ijq,qc->ijc", weights.astype(pixels.dtype), pixels)

    n = len(level)
    chunk = min(CHUNK, n)

    def chunks(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, ((0, -n % chunk), *((0, 0),) * (a.ndim - 1)), mode="edge")
        return a.reshape(-1, chunk, *a.shape[1:])  # [n, ...] -> [chunks, chunk, ...]

    # Only a chunk's pixels are in memory at a time, in the backward pass too.
    out = lax.map(
        jax.checkpoint(lambda part: jax.vmap(pool)(*part)), jax.tree.map(chunks, (rows, columns, starts, widths))
    )
    return out.reshape(-1, *out.shape[2:])[:n]  # [chunks, chunk, p, p, c] -> [n, p, p, c]


def window_pixels(shapes: Sequence[tuple[int, int]], first_stride: int) -> int:
    """The most map pixels that a box of any level and shape can need, q.

    An interval of length x touches fewer than x + 3 pixels, and a box of a level that is not the last has
    w h < (2 * finest / first_stride)^2 in pixels of its map.
    """
    limit = (2 * FINEST / first_stride) ** 2
    most = math.prod(shapes[-1])
    for rows, columns in shapes[:-1]:
        for across in range(1, columns + 1):
            down = math.ceil(limit / (across - 3)) + 2 if across > 3 else rows
            most = max(most, across * min(down, rows))
    return most


ROI_ALIGN_IMPLS: dict[str, Callable[..., jax.Array]] = {"dense": dense, "window": window}
# The formulation of each backend for maps of more than DENSE_PIXELS; one that is not named here gathers windows.
FORMULATIONS: dict[str, str] = {"tpu": "dense"}
