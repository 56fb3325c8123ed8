import itertools
import json
import pathlib

import numpy as np
import pytest
from helpers.tiers import tiered

from halvit_jax.data.canvases import EvalPlan, TrainPlan, choose, scaled

CANVASES = ((20, 30), (30, 20), (20, 40))
CHOSEN = np.array([0] * 13 + [1] * 9 + [2] * 3)
IMAGES = np.arange(100, 125)


def _plan(seed: int = 0, batch_size: int = 4) -> TrainPlan:
    return TrainPlan(CANVASES, CHOSEN, IMAGES, batch_size=batch_size, seed=seed)


def _take(plan: TrainPlan, first: int, count: int) -> list[tuple]:
    slots = itertools.islice(plan.slots(first), count)
    return [(slot.canvas, slot.images.tolist(), slot.draws.tobytes()) for slot in slots]


def test_sizes_are_those_that_mmcv_computes(golden: pathlib.Path) -> None:
    for row in json.loads((golden / "detection/resize.json").read_text())["rows"]:
        long_side, short_side = row["limit"]
        assert scaled(np.array([row["from"]]), short_side, long_side).tolist() == [row["to"]]


def test_images_keep_their_size_where_no_short_side_is_given() -> None:
    assert scaled(np.array([[7, 9], [300, 2]]), 0, 10).tolist() == [[7, 9], [300, 2]]


def test_an_image_goes_to_the_smallest_canvas_that_holds_it() -> None:
    sizes = np.array([[20, 20], [20, 30], [20, 31], [25, 10], [1, 40]])
    assert choose(sizes, CANVASES).tolist() == [0, 0, 2, 1, 2]


def test_a_canvas_that_is_missing_or_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"instances.canvases=\(\(20, 30\),\) hold no image of 21 x 30 .* are 2; add"):
        choose(np.array([[21, 30], [3, 3], [21, 30]]), CANVASES[:1])
    for wrong in ((), ((20,),), ((0, 10),)):
        with pytest.raises(ValueError, match=r"instances.canvases=.* must be one or more \(height, width\)"):
            choose(np.array([[3, 3]]), wrong)


def test_an_epoch_has_all_whole_batches_of_every_canvas_in_random_order() -> None:
    plan = _plan()
    assert plan.steps_per_epoch == 3 + 2 + 0
    assert plan.never_used == 3
    epochs = [_take(plan, 5 * epoch, 5) for epoch in range(3)]
    for epoch in epochs:
        images = [image for _, own, _ in epoch for image in own]
        assert len(images) == len(set(images)) == 20
        for canvas, own, _ in epoch:
            assert {CANVASES[CHOSEN[image - 100]] for image in own} == {canvas}
    assert len({tuple(canvas for canvas, _, _ in epoch) for epoch in epochs}) > 1
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("start", tiered(range(12), {3, 7}))
def test_a_plan_resumes_at_any_step_and_depends_on_its_seed(start: int) -> None:
    assert _take(_plan(), start, 12) == _take(_plan(), 0, start + 12)[start:]
    assert _take(_plan(seed=1), 0, 5) != _take(_plan(), 0, 5)


def test_hosts_share_the_rows_of_a_batch() -> None:
    (whole,) = itertools.islice(_plan().slots(3), 1)
    for count in (1, 2, 4):
        parts = [whole.rows(index, count) for index in range(count)]
        for field in ("images", "mask", "draws"):
            joined = np.concatenate([getattr(part, field) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, field))


def test_a_batch_that_no_canvas_fills_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"batch_size=14 is more than .* any canvas \(20 x 30: 13, 30 x 20: 9, 20"):
        _plan(batch_size=14)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_an_evaluation_has_every_image_once(batch_size: int) -> None:
    plan = EvalPlan(CANVASES, CHOSEN, batch_size=batch_size)
    slots = list(plan.slots())
    assert len(slots) == plan.steps_per_epoch
    assert sorted(image for slot in slots for image in slot.images[slot.mask]) == list(range(25))
    assert [slot.canvas for slot in slots] == sorted((slot.canvas for slot in slots), key=CANVASES.index)
    assert [slot.images.tolist() for slot in plan.slots(2)] == [slot.images.tolist() for slot in slots[2:]]
