import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.detection.assign import BACKGROUND, NEITHER, Matching, assign
from halvit_jax.detection.boxes import iof, iou

RPN = Matching(0.7, 0.3, 0.3)
RCNN = Matching(0.5, 0.5, 0.5)
RETINA = Matching(0.5, 0.4, 0.0)
CASES = {
    "rpn": ("anchors", RPN),
    "rpn_no_low_quality": ("anchors", dataclasses.replace(RPN, low_quality=False)),
    "rcnn": ("proposals", RCNN),
    "rcnn_no_low_quality": ("proposals", dataclasses.replace(RCNN, low_quality=False)),
}


_direct = jax.jit(assign, static_argnums=2)


def _assign(truth: np.ndarray, candidates: np.ndarray, matching: Matching, padding: int = 3, **more: Any) -> np.ndarray:
    """With rows of padding that would be good matches, were they real."""
    rows = np.concatenate([truth, candidates[:padding]])
    real = jnp.arange(len(rows)) < len(truth)
    return np.asarray(jax.jit(lambda overlaps: assign(overlaps, real, matching, **more))(iou(rows, candidates)))


@pytest.mark.parametrize("name", CASES)
def test_golden_assignment(case: Any, name: str) -> None:
    _, arrays = case("assign")
    source, matching = CASES[name]
    np.testing.assert_array_equal(_assign(arrays["gt"], arrays[source], matching), arrays[name])


def test_golden_assignment_of_retinanet_without_the_tiny_box(case: Any) -> None:
    _, arrays = case("assign")
    code = _assign(np.delete(arrays["gt"], 1, axis=0), arrays["anchors"], RETINA)
    numbers = np.delete(np.arange(len(arrays["gt"])), 1)
    np.testing.assert_array_equal(np.where(code >= 0, numbers[code], code), arrays["retina"])


def test_golden_assignment_of_torchvision_but_for_ties_that_rounding_breaks(case: Any) -> None:
    _, arrays = case("assign")
    code = _assign(arrays["gt"], arrays["anchors"], dataclasses.replace(RPN, least=0.0, claimed_by_last=False))
    # The 4 x 5 box 1 lies inside of 136 anchors of one size; float32 makes 4 of the 136 equal IoUs a bit larger.
    overlaps = np.asarray(iou(arrays["gt"][1:2], arrays["anchors"]))[0]
    broken = (overlaps >= overlaps.max() - 1e-6) & (arrays["torchvision_rpn"] == BACKGROUND)
    assert broken.sum() == 132
    np.testing.assert_array_equal(code[~broken], arrays["torchvision_rpn"][~broken])


def test_golden_assignment_beside_an_ignored_region(case: Any) -> None:
    _, arrays = case("assign")
    usable = iof(arrays["anchors"], arrays["ignore"]).max(1) <= 0.5
    code = _assign(arrays["gt"], arrays["anchors"], RPN, usable=usable)
    np.testing.assert_array_equal(code, arrays["rpn_ignore"])


def test_golden_assignment_without_boxes_is_all_background(case: Any) -> None:
    _, arrays = case("assign")
    for padding in (0, 3):
        code = _assign(np.zeros((0, 4), np.float32), arrays["anchors"], RPN, padding)
        np.testing.assert_array_equal(code, arrays["rpn_no_gt"])


def test_ties_within_rounding_count_as_equal() -> None:
    overlaps = jnp.asarray([[0.5, 0.5 - 4e-7, 0.4], [0.1, 0.6, 0.6]])
    code = _direct(overlaps, jnp.ones(2, bool), Matching(0.7, 0.3, 0.3))
    assert code.tolist() == [0, 1, 1]


def test_a_box_without_overlap_claims_nothing() -> None:
    code = _direct(jnp.zeros((1, 4)), jnp.ones(1, bool), RETINA)
    assert code.tolist() == [BACKGROUND] * 4


def test_unusable_candidates_claim_nothing_and_train_nothing() -> None:
    overlaps, usable = jnp.asarray([[0.9, 0.4]]), jnp.asarray([False, True])
    assert _direct(overlaps, jnp.ones(1, bool), RPN, usable).tolist() == [NEITHER, 0]


def test_every_image_of_a_batch_by_itself(case: Any) -> None:
    _, arrays = case("assign")
    overlaps = jnp.stack([iou(arrays["gt"], arrays["proposals"])] * 2)
    real = jnp.stack([jnp.ones(8, bool), jnp.zeros(8, bool)])
    code = jax.jit(jax.vmap(lambda overlaps, real: assign(overlaps, real, RCNN)))(overlaps, real)
    np.testing.assert_array_equal(code, [arrays["rcnn"], np.full(60, BACKGROUND)])
