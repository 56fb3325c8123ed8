"""Boxes (x1, y1, x2, y2) in continuous pixels: pixel i covers [i, i + 1), so a width is x2 - x1.

All functions take boxes [..., 4] of any leading shape, compute in float32 and broadcast. Sources: mmdetection 3.3
`bbox_overlaps` and `DeltaXYWHBBoxCoder`; the coding is of Girshick et al. 2014 (arXiv 1311.2524, appendix C).

Shapes: `n`, `m` boxes.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from halvit_jax.detection.conventions import UNION_FLOOR
from halvit_jax.layers.arrays import align_last

RPN_STD = (1.0, 1.0, 1.0, 1.0)
ROI_STD = (0.1, 0.1, 0.2, 0.2)
MAX_LOG_RATIO = math.log(1000 / 16)  # by which a decoded side may differ from the side it is coded against


def area(boxes: jax.Array) -> jax.Array:
    """Areas in square pixels, 0 where a side is negative: [..., 4] -> [...]."""
    boxes = boxes.astype(jnp.float32)
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return jnp.maximum(width, 0) * jnp.maximum(height, 0)


def intersection(a: jax.Array, b: jax.Array) -> jax.Array:
    """Areas shared by every pair: [..., n, 4], [..., m, 4] -> [..., n, m]."""
    a, b = (boxes.astype(jnp.float32) for boxes in (a, b))
    corners_a = [a[..., :, None, i] for i in range(4)]
    corners_b = [b[..., None, :, i] for i in range(4)]
    width = jnp.minimum(corners_a[2], corners_b[2]) - jnp.maximum(corners_a[0], corners_b[0])
    height = jnp.minimum(corners_a[3], corners_b[3]) - jnp.maximum(corners_a[1], corners_b[1])
    return jnp.maximum(width, 0) * jnp.maximum(height, 0)


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of every pair: [..., n, 4], [..., m, 4] -> [..., n, m] in [0, 1]; 0 for no area."""
    shared = intersection(a, b)
    union = area(a)[..., :, None] + area(b)[..., None, :] - shared
    return shared / jnp.maximum(union, UNION_FLOOR)


def iof(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over the area of `a`, of every pair: [..., n, 4], [..., m, 4] -> [..., n, m]."""
    return intersection(a, b) / jnp.maximum(area(a), UNION_FLOOR)[..., :, None]


def encode(anchors: jax.Array, boxes: jax.Array, std: Sequence[float] = RPN_STD) -> jax.Array:
    """Offsets of `boxes` from `anchors`, [..., 4] each: ((gx - px) / pw, (gy - py) / ph, ln gw/pw, ln gh/ph) / std.

    (px, py) and (gx, gy) are centres. Sides must be positive; a padding row is given a real box by the caller, because
    an infinite code would turn its gradient into NaN even where the row is discarded.
    """
    ax, ay, aw, ah = _centre_size(anchors)
    bx, by, bw, bh = _centre_size(boxes)
    deltas = jnp.stack([(bx - ax) / aw, (by - ay) / ah, jnp.log(bw / aw), jnp.log(bh / ah)], axis=-1)
    return deltas / align_last(jnp.asarray(std, jnp.float32), deltas)


def decode(
    anchors: jax.Array, deltas: jax.Array, std: Sequence[float] = RPN_STD, *, clamp_shrinking: bool = True
) -> jax.Array:
    """The boxes that `deltas` code against `anchors`, the inverse of `encode`: [..., 4], [..., 4] -> [..., 4].

    Log sizes are bounded by ln(1000 / 16) from above, and from below unless `clamp_shrinking` is False.
    """
    x, y, width, height = _centre_size(anchors)
    scaled = deltas.astype(jnp.float32) * align_last(jnp.asarray(std, jnp.float32), deltas)
    sizes = jnp.clip(scaled[..., 2:], -MAX_LOG_RATIO if clamp_shrinking else None, MAX_LOG_RATIO)
    x, y = x + scaled[..., 0] * width, y + scaled[..., 1] * height
    width, height = width * jnp.exp(sizes[..., 0]), height * jnp.exp(sizes[..., 1])
    return jnp.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=-1)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Boxes cut at the borders of an image: [..., 4] with `size` [..., 2] = (rows, columns), broadcast -> [..., 4]."""
    rows, columns = size[..., 0], size[..., 1]
    limit = jnp.stack([columns, rows, columns, rows], axis=-1)
    return jnp.clip(boxes, 0, align_last(limit.astype(boxes.dtype), boxes))


def rescale(boxes: jax.Array, size: jax.Array, original: jax.Array) -> jax.Array:
    """Boxes of an image of `size` in the image of size `original` it was resized from; sizes are (rows, columns)."""
    rows, columns = (original[..., i] / size[..., i] for i in (0, 1))
    return boxes * align_last(jnp.stack([columns, rows, columns, rows], axis=-1), boxes)


def _centre_size(boxes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    boxes = boxes.astype(jnp.float32)
    x1, y1, x2, y2 = (boxes[..., i] for i in range(4))
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
