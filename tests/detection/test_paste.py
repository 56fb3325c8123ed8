from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from halvit_jax.detection.paste import paste, paste_torchvision


def _bits(bits: np.ndarray) -> np.ndarray:
    return np.unpackbits(bits).reshape(8, 96, 128).astype(bool)


def test_golden_pasted_masks(case: Any) -> None:
    _, arrays = case("masks")
    drawn = paste(arrays["paste_probabilities"], arrays["paste_boxes"], 96, 128)
    sure = np.abs(arrays["pasted"] / 65535 - 0.5) > 1e-4
    np.testing.assert_array_equal(drawn[sure], _bits(arrays["pasted_bits"])[sure])
    assert np.mean(drawn != _bits(arrays["pasted_bits"])) < 1e-4


def test_golden_pasted_masks_of_torchvision(case: Any) -> None:
    _, arrays = case("masks")
    drawn = paste_torchvision(arrays["paste_probabilities"], arrays["paste_boxes"], 96, 128)
    assert np.mean(drawn != _bits(arrays["torchvision_pasted_bits"])) < 1e-4


@pytest.mark.parametrize("function", [paste, paste_torchvision])
def test_boxes_beside_the_image_and_none_at_all_draw_nothing(function: Callable[..., np.ndarray]) -> None:
    boxes = np.asarray([[-50.0, -50, -10, -10], [200, 10, 240, 20]])
    assert not function(np.ones((2, 28, 28)), boxes, 96, 128).any()
    assert function(np.ones((0, 28, 28)), np.zeros((0, 4)), 96, 128).shape == (0, 96, 128)


def test_a_box_of_no_area_draws_nothing() -> None:
    assert not paste(np.ones((2, 28, 28)), np.asarray([[5.0, 5, 5, 9], [9, 9, 3, 12]]), 20, 20).any()


def test_a_full_mask_fills_its_box() -> None:
    drawn = paste(np.ones((1, 28, 28)), np.asarray([[4.0, 2, 14, 8]]), 20, 20)[0]
    assert drawn.sum() == 60
    assert drawn[2:8, 4:14].all()
