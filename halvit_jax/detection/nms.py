"""Greedy non-maximum suppression in static shapes.

In order of score, equal scores by lower index, a box is kept unless a kept one before it has an IoU strictly above
the threshold with it. Two formulations give the same boxes:

- `sequential`: one box after the other, each clearing what it suppresses. n dependent rounds of n operations, and
  none once `limit` boxes are kept.
- `fixed_point`: with S[i, j] = (i before j) and IoU > t, repeat keep_j <- valid_j and no i has S[i, j] and keep_i,
  from keep = valid until nothing changes. After round r every box is right whose chain of suppressors is at most r
  long, and chains are short: 2 to 6 rounds at 1,000 to 2,000 boxes. All of a round is parallel.

`FORMULATIONS` is the one switch: the CPU is faster with the first, accelerators with the second.

Shapes: `n` boxes, `m` of them returned.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from halvit_jax.detection.boxes import area, iou
from halvit_jax.detection.conventions import UNION_FLOOR


class Kept(NamedTuple):
    """The boxes that survive, in order of score; empty slots come last."""

    index: jax.Array  # [m] int32, which box; 0 in an empty slot
    valid: jax.Array  # [m] bool


def nms(
    boxes: jax.Array,
    scores: jax.Array,
    *,
    threshold: float,
    valid: jax.Array | None = None,
    labels: jax.Array | None = None,
    limit: int | None = None,
    formulation: str | None = None,
) -> Kept:
    """The `limit` best boxes that no better box of the same label overlaps: boxes [n, 4], scores [n] -> Kept [m].

    `valid` [n] marks the rows that are boxes; a row with a score of NaN is none. With `labels` [n] only boxes of equal
    labels suppress each other. `limit` defaults to n, m = min(limit, n). `formulation` defaults to the backend's.
    """
    n = boxes.shape[0]
    m = n if limit is None else min(limit, n)
    valid = ~jnp.isnan(scores) if valid is None else valid & ~jnp.isnan(scores)
    if not m:
        return Kept(jnp.zeros(0, jnp.int32), jnp.zeros(0, bool))
    _, order = lax.top_k(jnp.where(valid, scores.astype(jnp.float32), -jnp.inf), n)
    labels = jnp.zeros(n, jnp.int32) if labels is None else jnp.asarray(labels)
    suppress = NMS_IMPLS[formulation or FORMULATIONS.get(jax.default_backend(), "fixed_point")]
    keep = suppress(boxes[order].astype(jnp.float32), labels[order], valid[order], threshold, m)
    # Kept ones first, in order: their ranks as the smallest of all.
    rank = jnp.where(keep, jnp.arange(n), n)
    _, place = lax.top_k(-rank, m)
    found = keep[place]
    return Kept(jnp.where(found, order[place], 0), found)


class Detections(NamedTuple):
    """The final boxes of an image, in order of score; empty slots come last and are 0."""

    boxes: jax.Array  # [m, 4]
    scores: jax.Array  # [m]
    labels: jax.Array  # [m] int32
    valid: jax.Array  # [m] bool
    truncated: jax.Array  # bool: fewer than m survived of those looked at, and not all were looked at


def class_nms(
    boxes: jax.Array,
    scores: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    *,
    threshold: float,
    limit: int,
    candidates: int = 2048,
) -> Detections:
    """The `limit` best boxes after suppression within their class: [n, 4], [n], [n], [n] -> Detections [limit].

    Only the `candidates` best of the valid ones are looked at. That is exact where there are no more of them or where
    `limit` survive, because greedy suppression of a prefix is the prefix of greedy suppression.
    """
    valid &= ~jnp.isnan(scores)
    _, best = lax.top_k(jnp.where(valid, scores, -jnp.inf), min(candidates, len(scores)))
    boxes, scores, labels = boxes[best], scores[best], labels[best]
    kept = nms(boxes, scores, threshold=threshold, valid=valid[best], labels=labels, limit=limit)
    missing = limit - len(kept.index)

    def fill(array: jax.Array) -> jax.Array:
        found = kept.valid.reshape(-1, *(1,) * (array.ndim - 1))
        return jnp.pad(jnp.where(found, array[kept.index], 0), ((0, missing), *((0, 0),) * (array.ndim - 1)))

    truncated = (valid.sum() > candidates) & (kept.valid.sum() < limit)
    return Detections(fill(boxes), fill(scores), fill(labels), jnp.pad(kept.valid, (0, missing)), truncated)


def fixed_point(boxes: jax.Array, labels: jax.Array, valid: jax.Array, threshold: float, limit: int) -> jax.Array:
    """Keep flags of ranked boxes [n, 4], all at once and again until nothing changes: [n] bool."""
    del limit  # stopping early would save no round
    n = boxes.shape[0]
    earlier = jnp.arange(n)[:, None] < jnp.arange(n)[None]
    suppresses = (iou(boxes, boxes) > threshold) & (labels[:, None] == labels[None]) & earlier

    def refine(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        keep, _ = state
        new = valid & ~jnp.any(suppresses & keep[:, None], axis=0)
        return new, jnp.any(new != keep)

    return lax.while_loop(lambda state: state[1], refine, (valid, jnp.any(valid)))[0]


def sequential(boxes: jax.Array, labels: jax.Array, valid: jax.Array, threshold: float, limit: int) -> jax.Array:
    """Keep flags of ranked boxes [n, 4], one after the other until `limit` are kept: [n] bool."""
    n = boxes.shape[0]
    areas, index = area(boxes), jnp.arange(n)
    x1, y1, x2, y2 = (boxes[:, i] for i in range(4))

    def more(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        i, _, kept = state
        return (i < n) & (kept < limit)

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, keep, kept = state
        width = jnp.minimum(x2[i], x2) - jnp.maximum(x1[i], x1)
        height = jnp.minimum(y2[i], y2) - jnp.maximum(y1[i], y1)
        shared = jnp.maximum(width, 0) * jnp.maximum(height, 0)
        overlaps = shared / jnp.maximum(areas[i] + areas - shared, UNION_FLOOR) > threshold
        gone = keep[i] & overlaps & (labels == labels[i]) & (index > i)
        return i + 1, keep & ~gone, kept + keep[i].astype(jnp.int32)

    reached, keep, _ = lax.while_loop(more, step, (jnp.int32(0), valid, jnp.int32(0)))
    return keep & (index < reached)


NMS_IMPLS: dict[str, Callable[..., jax.Array]] = {"fixed_point": fixed_point, "sequential": sequential}
# The formulation of each backend; one that is not named here gets the parallel one.
FORMULATIONS: dict[str, str] = {"cpu": "sequential"}
