import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.detection.nms import NMS_IMPLS, class_nms, nms

every_formulation = pytest.mark.parametrize("formulation", NMS_IMPLS)


def _kept(boxes: Any, scores: Any, **options: Any) -> list[int]:
    kept = jax.jit(lambda boxes, scores: nms(boxes, scores, **options))(jnp.asarray(boxes), jnp.asarray(scores))
    assert not (np.diff(kept.valid.astype(int)) > 0).any()  # empty slots come last
    return np.asarray(kept.index)[np.asarray(kept.valid)].tolist()


@every_formulation
@pytest.mark.parametrize("tenths", [3, 5, 7])
def test_golden_kept_boxes(case: Any, formulation: str, tenths: int) -> None:
    _, arrays = case("nms")
    kept = _kept(arrays["boxes"], arrays["scores"], threshold=tenths / 10, formulation=formulation)
    assert kept == arrays[f"keep_{tenths}"].tolist()


@every_formulation
def test_golden_kept_boxes_by_class_and_their_limit(case: Any, formulation: str) -> None:
    _, arrays = case("nms")
    options = {"threshold": 0.5, "labels": arrays["labels"], "formulation": formulation}
    expected = arrays["keep_by_class_5"].tolist()
    assert _kept(arrays["boxes"], arrays["scores"], **options) == expected
    assert _kept(arrays["boxes"], arrays["scores"], limit=37, **options) == expected[:37]


@every_formulation
def test_scores_of_nan_and_padding_are_never_kept(formulation: str) -> None:
    boxes = [[0.0, 0, 9, 9]] * 3 + [[20, 20, 30, 30]]
    kept = _kept(boxes, [np.nan, 0.5, 0.9, 0.7], threshold=0.5, formulation=formulation)
    assert kept == [2, 3]
    valid = jnp.asarray([True, True, False, True])
    assert _kept(boxes, [np.nan, 0.5, 0.9, 0.7], threshold=0.5, valid=valid, formulation=formulation) == [3, 1]
    nothing = jnp.zeros(4, bool)
    assert _kept(boxes, [1.0, 2, 3, 4], threshold=0.5, valid=nothing, formulation=formulation) == []


@every_formulation
def test_ties_go_to_the_lower_index_and_equality_does_not_suppress(formulation: str) -> None:
    boxes = [[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 5]]  # IoU 1 and exactly .5
    assert _kept(boxes, [0.3, 0.3, 0.3], threshold=0.5, formulation=formulation) == [0, 2]


@every_formulation
def test_boxes_without_area_suppress_nothing(formulation: str) -> None:
    assert _kept([[5.0, 5, 5, 5]] * 3, [0.1, 0.2, 0.3], threshold=0.5, formulation=formulation) == [2, 1, 0]


@every_formulation
def test_a_chain_of_suppressors_is_resolved_as_greedily(formulation: str) -> None:
    x = np.arange(40) * 3.0
    chain = np.stack([x, 0 * x, x + 10, 0 * x + 10], -1)  # each suppresses the next alone
    assert _kept(chain, -np.arange(40.0), threshold=0.5, formulation=formulation) == list(range(0, 40, 2))


@every_formulation
def test_all_images_of_a_batch_at_once(formulation: str) -> None:
    rng = np.random.default_rng(2)
    corner = rng.uniform(0, 50, (3, 60, 2))
    boxes = jnp.asarray(np.concatenate([corner, corner + rng.uniform(1, 40, corner.shape)], -1))
    scores = jnp.asarray(rng.uniform(size=(3, 60)))
    suppress = functools.partial(nms, threshold=0.4, limit=20, formulation=formulation)
    together, alone = jax.jit(jax.vmap(suppress))(boxes, scores), jax.jit(suppress)
    for i in range(3):
        np.testing.assert_array_equal(together.index[i], alone(boxes[i], scores[i]).index)


def test_no_boxes_are_none_kept() -> None:
    kept = nms(jnp.zeros((0, 4)), jnp.zeros(0), threshold=0.5, limit=5)
    assert kept.index.shape == kept.valid.shape == (0,)


@pytest.mark.parametrize("limit", [20, 100])
def test_golden_end_of_the_second_stage(case: Any, limit: int) -> None:
    _, arrays = case("nms")
    scores = jax.nn.softmax(arrays["logits"])[:, :-1]
    n, classes = scores.shape
    labels = jnp.tile(jnp.arange(classes), n)
    boxes = jnp.asarray(arrays["class_boxes"]).reshape(-1, 4)
    flat = scores.reshape(-1)
    found = jax.jit(lambda: class_nms(boxes, flat, labels, flat > 0.05, threshold=0.5, limit=limit))()
    assert found.valid.all()
    assert not found.truncated
    np.testing.assert_array_equal(found.labels, arrays[f"final_{limit}_labels"])
    np.testing.assert_allclose(found.boxes, arrays[f"final_{limit}_boxes"], atol=1e-5)
    np.testing.assert_allclose(found.scores, arrays[f"final_{limit}_scores"], atol=1e-5)


def test_truncated_is_said_when_candidates_and_detections_run_out() -> None:
    boxes, scores = jnp.tile(jnp.asarray([0.0, 0, 5, 5]), (50, 1)), jnp.linspace(0, 1, 50)
    suppress = jax.jit(
        lambda candidates, limit: class_nms(
            boxes, scores, jnp.arange(50) // 25, scores > 0, threshold=0.5, limit=limit, candidates=candidates
        ),
        static_argnums=(0, 1),
    )
    assert suppress(20, 2).truncated  # only one class among the 20 best
    assert not suppress(20, 1).truncated
    found = suppress(50, 4)
    assert not found.truncated
    assert found.valid.tolist() == [True, True, False, False]
    assert found.labels.tolist() == [1, 0, 0, 0]
