import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from halvit_jax.detection.boxes import ROI_STD, clip, encode
from halvit_jax.detection.targets import box_targets, mask_targets


def _bitmaps(info: Any, bits: np.ndarray) -> np.ndarray:
    height, width = info["height"], info["width"]
    count = bits.size * 8 // (height * width)
    return np.unpackbits(bits)[: count * height * width].reshape(count, height, width)


def _targets(case: Any, **options: Any) -> np.ndarray:
    info, arrays = case("masks")
    canvas = jnp.asarray([info["height"], info["width"]])
    masks = _bitmaps(info, arrays["bitmaps"]).astype(np.float32)[arrays["object"]]
    boxes = clip(jnp.asarray(arrays["proposals"]), canvas)
    regions = jnp.broadcast_to(jnp.asarray([0.0, 0, info["width"], info["height"]]), boxes.shape)
    return np.asarray(jax.jit(lambda m, b: mask_targets(m, regions, b, **options))(masks, boxes))


def test_golden_targets_from_bitmaps(case: Any) -> None:
    _, arrays = case("masks")
    expected = np.unpackbits(arrays["targets"])[: 21 * 28 * 28].reshape(21, 28, 28)
    sure = np.abs(arrays["targets_soft"] / 65535 - 0.5) > 1e-4
    np.testing.assert_array_equal(_targets(case)[sure], expected[sure])


def test_golden_soft_targets_of_torchvision(case: Any) -> None:
    _, arrays = case("masks")
    np.testing.assert_allclose(_targets(case, soft=True), arrays["torchvision_targets"] / 65535, atol=5e-5)


def test_targets_from_a_crop_of_the_object_differ_little_from_the_bitmap(case: Any) -> None:
    info, arrays = case("masks")
    masks, regions = [], []
    for bitmap, box in zip(_bitmaps(info, arrays["bitmaps"]), info["bbox_of_mask"], strict=True):
        x1, y1, x2, y2 = box
        rows, columns = (np.minimum((np.arange(112) + 0.5) * n / 112, n - 1).astype(int) for n in (y2 - y1, x2 - x1))
        masks.append(255 * bitmap[y1:y2, x1:x2][rows[:, None], columns])
        regions.append(box)
    objects = arrays["object"]
    boxes = clip(jnp.asarray(arrays["proposals"]), jnp.asarray([info["height"], info["width"]]))
    drawn = jax.jit(mask_targets)(np.stack(masks)[objects], np.asarray(regions)[objects], boxes)
    expected = np.unpackbits(arrays["targets"])[: 21 * 28 * 28].reshape(21, 28, 28)
    assert np.mean(np.asarray(drawn) != expected) < 0.015


def test_a_box_beside_its_object_and_one_of_no_area_are_empty() -> None:
    masks, regions = np.full((2, 8, 8), 255, np.uint8), np.asarray([[0.0, 0, 10, 10]] * 2)
    drawn = jax.jit(mask_targets)(masks, regions, np.asarray([[20.0, 20, 30, 30], [5, 5, 5, 5]]))
    assert not np.any(drawn)


def test_box_targets_are_codes_where_there_is_a_box_and_finite_elsewhere() -> None:
    candidates = jnp.asarray([[0.0, 0, 10, 10], [5, 5, 5, 5], [0, 0, 20, 20]])
    truth = jnp.asarray([[1.0, 1, 12, 9], [0, 0, 0, 0]])
    targets = jax.jit(functools.partial(box_targets, std=ROI_STD))
    deltas, positive = (np.asarray(a) for a in targets(candidates, truth, jnp.asarray([0, -1, -2])))
    assert positive.tolist() == [True, False, False]
    np.testing.assert_allclose(deltas[0], encode(candidates[0], truth[0], ROI_STD), rtol=1e-6)
    assert not deltas[1:].any()
    deltas, positive = targets(candidates, jnp.zeros((0, 4)), jnp.asarray([-1, -1, -2]))
    assert not deltas.any()
    assert not positive.any()
