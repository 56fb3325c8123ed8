"""Assignment of a ground-truth box to each anchor or proposal.

Source: mmdetection 3.3 `MaxIoUAssigner`; Ren et al. 2015 (arXiv 1506.01497, section 3.1.2). torchvision's `Matcher`
differs in the last step only.

Shapes: `g` ground-truth rows (padding among them), `a` candidates.
"""

import dataclasses

import jax
import jax.numpy as jnp

from halvit_jax.detection.conventions import TIE

BACKGROUND = -1
NEITHER = -2  # trains nothing


@dataclasses.dataclass(frozen=True)
class Matching:
    """IoU thresholds of an assignment."""

    positive: float  # at least this with its best box: that box
    negative: float  # less than this with every box: background
    least: float = 0.0  # with which a box claims its best candidates although they are not positive
    low_quality: bool = True  # whether boxes claim candidates at all
    claimed_by_last: bool = True  # a candidate claimed by several goes to the last of them; else to its own best box


def assign(iou: jax.Array, real: jax.Array, matching: Matching, usable: jax.Array | None = None) -> jax.Array:
    """The ground-truth row of each candidate, `BACKGROUND` or `NEITHER`: [g, a], [g] -> int32 [a].

    In order: a candidate whose best IoU is below `negative` is background; one whose best IoU reaches `positive`
    gets the first box with that IoU; then each box whose own best IoU reaches `least` claims every candidate that
    ties with it, within 1e-6. `real` [g] marks the rows that are boxes; with none of them all is background.
    Candidates that are not `usable` [a] are `NEITHER` and claim nothing. A box without any overlap claims nothing.
    """
    usable = jnp.ones(iou.shape[1], bool) if usable is None else usable
    iou = jnp.where(real[:, None] & usable[None], iou, -1.0)
    best, best_box = jnp.max(iou, 0, initial=-1.0), _first_best(iou)
    code = jnp.where(best < matching.negative, BACKGROUND, NEITHER)
    code = jnp.where(best >= matching.positive, best_box, code)
    if matching.low_quality:
        best_of_box = jnp.max(iou, 1, initial=-1.0)
        claims = (iou >= best_of_box[:, None] - TIE) & (iou > 0) & (best_of_box >= matching.least)[:, None]
        number = jnp.arange(iou.shape[0], dtype=jnp.int32)[:, None]
        last = jnp.max(jnp.where(claims, number, -1), 0, initial=-1)
        code = jnp.where(last >= 0, last if matching.claimed_by_last else best_box, code)
    return jnp.where(usable, code, NEITHER).astype(jnp.int32)


def _first_best(iou: jax.Array) -> jax.Array:
    """argmax over g, also when there is no row at all."""
    if not iou.shape[0]:
        return jnp.zeros(iou.shape[1], jnp.int32)
    return jnp.argmax(iou, 0).astype(jnp.int32)
