"""From the scores and deltas of a region proposal network to the proposals of an image.

Source: mmdetection 3.3 `RPNHead._predict_by_feat_single`; Ren et al. 2015 (arXiv 1506.01497) on a pyramid (Lin et al.
2017, arXiv 1612.03144, section 4.1).

Shapes: `a` anchors of a level, `m` proposals.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from halvit_jax.detection.boxes import clip, decode
from halvit_jax.detection.nms import nms


class Proposals(NamedTuple):
    """The best boxes of an image, in order of score; empty slots come last and are boxes of no size at 0."""

    boxes: jax.Array  # [m, 4]
    scores: jax.Array  # [m], probabilities
    valid: jax.Array  # [m] bool


def propose(
    logits: Sequence[jax.Array],
    deltas: Sequence[jax.Array],
    anchors: Sequence[jax.Array],
    size: jax.Array,
    *,
    before: int,
    count: int,
    threshold: float = 0.7,
    min_side: float = 0.0,
    clamp_shrinking: bool = True,
) -> Proposals:
    """The `count` best proposals of one image whose (rows, columns) are `size` [2].

    Of each level, in `logits` [a], `deltas` and `anchors` [a, 4], the `before` best scores are decoded and cut at the
    image's border. Boxes with a side of 0 or below `min_side` go. Suppression is within a level; what survives
    competes over all levels. No gradient passes.
    """
    widest = max(min(before, level.shape[0]) for level in logits)
    candidates, ranks, given = [], [], []
    for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
        level_logits, level_deltas = (lax.stop_gradient(a).astype(jnp.float32) for a in (level_logits, level_deltas))
        k = min(before, level_logits.shape[0])
        best, index = lax.top_k(jnp.where(jnp.isnan(level_logits), -jnp.inf, level_logits), k)
        boxes = decode(jnp.asarray(level_anchors)[index], level_deltas[index], clamp_shrinking=clamp_shrinking)
        candidates.append(jnp.pad(clip(boxes, size), ((0, widest - k), (0, 0))))
        ranks.append(jnp.pad(best, (0, widest - k)))
        given.append(jnp.pad(~jnp.isnan(level_logits[index]), (0, widest - k)))
    # All levels side by side: as many dependent rounds as one of them has.
    boxes, rank, valid = jnp.stack(candidates), jnp.stack(ranks), jnp.stack(given)  # [levels, widest, ...]
    sides = boxes[..., 2:] - boxes[..., :2]
    valid &= jnp.all((sides > 0) & (sides >= min_side), axis=-1)
    kept = jax.vmap(lambda b, s, v: nms(b, s, threshold=threshold, valid=v, limit=count))(boxes, rank, valid)
    boxes = jnp.take_along_axis(boxes, kept.index[..., None], 1).reshape(-1, 4)
    rank = jnp.where(kept.valid, jnp.take_along_axis(rank, kept.index, 1), -jnp.inf).reshape(-1)
    k = min(count, rank.shape[0])
    rank, index = lax.top_k(rank, k)
    found = kept.valid.reshape(-1)[index]
    boxes = jnp.where(found[:, None], boxes[index], 0)
    missing = count - k
    return Proposals(
        jnp.pad(boxes, ((0, missing), (0, 0))),
        jnp.pad(jnp.where(found, jax.nn.sigmoid(rank), 0), (0, missing)),
        jnp.pad(found, (0, missing)),
    )
