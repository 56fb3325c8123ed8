"""Targets of the heads for sampled anchors and proposals.

Shapes: `n` drawn candidates, `g` ground-truth rows, `r` rows and columns of a stored mask.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from halvit_jax.detection.boxes import encode
from halvit_jax.detection.roi_align import axis_weights

MASK_SIZE = 28


def box_targets(
    candidates: jax.Array, boxes: jax.Array, code: jax.Array, std: Sequence[float]
) -> tuple[jax.Array, jax.Array]:
    """Codes of the boxes that candidates stand for, and whether they stand for any: ([n, 4], bool [n]).

    `candidates` [n, 4], ground truth `boxes` [g, 4], `code` [n] of `assign`. A candidate that stands for no box is
    coded as itself, which is finite.
    """
    positive = code >= 0
    if not boxes.shape[0]:
        return jnp.zeros_like(candidates), positive
    truth = boxes[jnp.maximum(code, 0)]
    safe = jnp.asarray([0.0, 0, 1, 1])  # for candidates of no area
    candidates, truth = (jnp.where(positive[:, None], b, safe) for b in (candidates, truth))
    return encode(candidates, truth, std), positive


def mask_targets(
    masks: jax.Array, regions: jax.Array, boxes: jax.Array, *, size: int = MASK_SIZE, soft: bool = False
) -> jax.Array:
    """The part of a mask inside of a box, as the mask head shall draw it: [n, r, r], [n, 4], [n, 4] -> [n, size, size].

    `masks` cover `regions` of the image: the object's own box, or (0, 0, columns, rows) where they are bitmaps of the
    whole canvas; outside of its region a mask is empty. Values up to 1, or up to 255 where the type is uint8. Each bin
    is the mean of samples as RoIAlign takes them, at or above .5 is 1; `soft` returns the mean itself, sampled
    without the half-pixel shift (torchvision).
    """
    rows, columns = masks.shape[-2:]
    scale = 1 / 255 if masks.dtype == jnp.uint8 else 1.0
    regions, boxes = regions.astype(jnp.float32), boxes.astype(jnp.float32)
    x1, y1 = regions[..., 0], regions[..., 1]
    per_column = columns / jnp.maximum(regions[..., 2] - x1, 1e-6)
    per_row = rows / jnp.maximum(regions[..., 3] - y1, 1e-6)
    shift, least = (0.0, 1.0) if soft else (0.5, 0.0)

    def weights(start: jax.Array, end: jax.Array, pixels: int) -> jax.Array:
        return axis_weights(start - shift, jnp.maximum(end - start, least), size, pixels)

    across = weights((boxes[..., 0] - x1) * per_column, (boxes[..., 2] - x1) * per_column, columns)
    down = weights((boxes[..., 1] - y1) * per_row, (boxes[..., 3] - y1) * per_row, rows)
    drawn = jnp.einsum("...ph,...hw,...qw->...pq", down, masks.astype(jnp.float32) * scale, across)
    return drawn if soft else (drawn >= 0.5).astype(jnp.float32)
