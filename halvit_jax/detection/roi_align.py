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

import jax
import jax.numpy as jnp
from jax import lax

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
    if not boxes.shape[0]:
        return jnp.zeros((0, bins, bins, maps[strides[0]].shape[-1]), maps[strides[0]].dtype)
    level = roi_level(boxes, len(strides), inside=level_inside)
    if formulation is None:
        small = math.prod(maps[strides[0]].shape[:2]) <= DENSE_PIXELS
        formulation = "dense" if small else FORMULATIONS.get(jax.default_backend(), "window")
    pool = ROI_ALIGN_IMPLS[formulation]
    return pool([maps[stride] for stride in strides], strides, boxes, level, bins, samples, aligned)


def roi_level(boxes: jax.Array, levels: int, *, inside: bool = True) -> jax.Array:
    """floor(log2(sqrt(w h) / 56 + 1e-6)) between 0 and levels - 1: [..., 4] -> int32 [...].

    `inside=False` adds the 1e-6 to the logarithm instead (torchvision). Compared with powers of two, which is exact.
    """
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    ratio = jnp.sqrt(jnp.maximum(width * height, 0)) / FINEST
    ratio = ratio + 1e-6 if inside else ratio * 2**1e-6
    powers = 2.0 ** jnp.arange(1, levels)
    return (ratio[..., None] >= powers).sum(-1, dtype=jnp.int32)


def axis_weights(
    start: jax.Array, length: jax.Array, bins: int, size: int, *, samples: int = 0, at: jax.Array | None = None
) -> jax.Array:
    """The weight of each pixel of an axis in each bin of an interval: [...], [...] -> [..., p, size].

    The interval is [start, start + length] in coordinates where pixel j is at j. It is cut into `bins`, each sampled
    at `samples` points (0: ceil(length / bins)). Samples outside of [-1, size] count 0, the others are moved into
    [0, size - 1]. `at` [..., q] asks for these pixels instead of all: -> [..., p, q].
    """
    start, length = start[..., None, None], length[..., None, None]  # [..., 1, 1]
    pixel = jnp.arange(size, dtype=jnp.float32) if at is None else at[..., None, :].astype(jnp.float32)
    width = length / bins
    count = jnp.ceil(width) if samples == 0 else jnp.full_like(width, samples)
    origin = start + jnp.arange(bins, dtype=jnp.float32)[:, None] * width  # [..., p, 1]
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


def dense(
    maps: list[jax.Array],
    strides: list[int],
    boxes: jax.Array,
    level: jax.Array,
    bins: int,
    samples: int,
    aligned: bool,
) -> jax.Array:
    """Two matrix products a level, over all of its map."""
    out = jnp.zeros((), maps[0].dtype)
    for i, (values, stride) in enumerate(zip(maps, strides, strict=True)):
        x, width, y, height = _intervals(boxes, stride, aligned)
        rows = axis_weights(y, height, bins, values.shape[0], samples=samples)  # [n, p, h]
        columns = axis_weights(x, width, bins, values.shape[1], samples=samples)  # [n, p, w]
        rows = jnp.where((level == i)[:, None, None], rows, 0)
        rows, columns = (weights.astype(values.dtype) for weights in (rows, columns))
        out += jnp.einsum("nqw,npwc->npqc", columns, jnp.einsum("nph,hwc->npwc", rows, values))
    return out


def window(
    maps: list[jax.Array],
    strides: list[int],
    boxes: jax.Array,
    level: jax.Array,
    bins: int,
    samples: int,
    aligned: bool,
) -> jax.Array:
    """The pixels a box needs as one list, and one product with their weights [p p, q]."""
    shapes = [values.shape[:2] for values in maps]
    starts = [sum(math.prod(shape) for shape in shapes[:i]) for i in range(len(maps))]
    flat = jnp.concatenate([values.reshape(-1, values.shape[-1]) for values in maps])  # [all pixels, c]
    q = window_pixels(shapes, strides[0])
    height, width, start, stride = (
        jnp.asarray(numbers)[level]
        for numbers in ([s[0] for s in shapes], [s[1] for s in shapes], starts, [float(s) for s in strides])
    )
    tallest, widest = (jnp.arange(max(shape[i] for shape in shapes)) for i in (0, 1))
    n = boxes.shape[0]
    chunk = min(CHUNK, n)
    padding = -n % chunk

    def pool(box: jax.Array, height: jax.Array, width: jax.Array, start: jax.Array, stride: jax.Array) -> jax.Array:
        x, length_x, y, length_y = _intervals(box, stride, aligned)
        top, bottom = _extent(y, length_y, height)
        left, right = _extent(x, length_x, width)
        across = right - left + 1
        number = jnp.arange(q)
        row, column = top + number // across, left + number % across
        used = row <= bottom
        rows = axis_weights(y, length_y, bins, height, samples=samples, at=tallest)  # [p, most rows]
        columns = axis_weights(x, length_x, bins, width, samples=samples, at=widest)  # [p, most columns]
        weights = jnp.where(used, rows[:, None, row] * columns[:, column], 0)  # [p, p, q]
        pixels = flat[jnp.where(used, start + row * width + column, start)]  # [q, c]
        return jnp.einsum("ijq,qc->ijc", weights.astype(pixels.dtype), pixels)

    arrays = [boxes, height, width, start, stride]
    arrays = [jnp.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1)), mode="edge") for a in arrays] if padding else arrays
    arrays = [a.reshape(-1, chunk, *a.shape[1:]) for a in arrays]  # [n, ...] -> [chunks, chunk, ...]
    out = lax.map(jax.checkpoint(lambda part: jax.vmap(pool)(*part)), arrays)
    return out.reshape(-1, bins, bins, flat.shape[-1])[:n]  # [chunks, chunk, p, p, c] -> [n, p, p, c]


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


def _intervals(boxes: jax.Array, stride: float, aligned: bool) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(x, width, y, height) in pixels of a map, whose first pixel is at 0."""
    scaled = boxes / stride - (0.5 if aligned else 0.0)
    x1, y1, x2, y2 = (scaled[..., i] for i in range(4))
    least = 0.0 if aligned else 1.0
    return x1, jnp.maximum(x2 - x1, least), y1, jnp.maximum(y2 - y1, least)


def _extent(start: jax.Array, length: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and last pixel that samples of an interval can touch."""
    first = jnp.clip(jnp.floor(start), 0, size - 1)
    last = jnp.clip(jnp.floor(start + length) + 1, 0, size - 1)
    return first.astype(jnp.int32), last.astype(jnp.int32)


ROI_ALIGN_IMPLS: dict[str, Callable[..., jax.Array]] = {"dense": dense, "window": window}
# The formulation of each backend for maps of more than DENSE_PIXELS; one that is not named here gathers windows.
FORMULATIONS: dict[str, str] = {"tpu": "dense"}
