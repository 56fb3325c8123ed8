import jax
import jax.numpy as jnp
import numpy as np

from halvit_jax.detection.anchors import Anchors
from halvit_jax.detection.boxes import clip, iou
from halvit_jax.detection.proposals import Proposals, propose

ANCHORS = [Anchors().grid(8, 8, 8), Anchors().grid(4, 4, 16)]
SIZE = jnp.asarray([64, 48])


def _propose(seed: int = 0, count: int = 20, before: int = 60) -> tuple[list[jax.Array], Proposals]:
    rng = np.random.default_rng(seed)
    logits = [jnp.asarray(rng.standard_normal(len(a)), jnp.float32) for a in ANCHORS]
    deltas = [jnp.zeros((len(a), 4)) for a in ANCHORS]
    made = jax.jit(lambda *given: propose(*given, ANCHORS, SIZE, before=before, count=count))(logits, deltas)
    return logits, made


def test_proposals_are_the_best_survivors_of_their_levels() -> None:
    logits, made = _propose(count=12)
    expected = []
    for level, anchors in zip(logits, ANCHORS, strict=True):
        boxes = np.asarray(clip(jnp.asarray(anchors), SIZE))
        overlaps, kept = np.asarray(iou(boxes, boxes)), []
        for i in np.argsort(-np.asarray(level), kind="stable")[:60]:
            empty = (boxes[i, 2:] <= boxes[i, :2]).any()
            if not empty and not any(overlaps[i, j] > 0.7 for j in kept):
                kept.append(i)
        expected += [(float(level[i]), *boxes[i]) for i in kept]
    expected = np.asarray(sorted(expected, reverse=True)[:12])
    assert made.valid.all()
    np.testing.assert_allclose(made.boxes, expected[:, 1:], atol=1e-4)
    np.testing.assert_allclose(made.scores, jax.nn.sigmoid(expected[:, 0]), rtol=1e-5)


def test_missing_proposals_are_empty_slots_at_the_end() -> None:
    _, made = _propose(count=500)
    assert made.boxes.shape == (500, 4)
    found = int(made.valid.sum())
    assert 0 < found < 500
    assert made.valid[:found].all()
    assert not made.boxes[found:].any()
    assert not made.scores[found:].any()


def test_scores_of_nan_are_no_proposals() -> None:
    logits = [jnp.full(len(a), jnp.nan) for a in ANCHORS]
    deltas = [jnp.zeros((len(a), 4)) for a in ANCHORS]
    made = jax.jit(lambda *given: propose(*given, ANCHORS, SIZE, before=10, count=5))
    assert not made(logits, deltas).valid.any()
    logits[0] = logits[0].at[100].set(-3)
    boxes, _, valid = made(logits, deltas)
    assert valid.tolist() == [True] + [False] * 4
    assert np.isfinite(boxes).all()


def test_no_gradient_reaches_the_network() -> None:
    def total(logits: jax.Array) -> jax.Array:
        made = propose([logits], [jnp.zeros((len(logits), 4))], ANCHORS[:1], SIZE, before=10, count=5)
        return made.boxes.sum() + made.scores.sum()

    assert not jax.jit(jax.grad(total))(jnp.linspace(0, 1, len(ANCHORS[0]))).any()
