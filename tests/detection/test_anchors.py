from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from halvit_jax.detection.anchors import Anchors, inside_flags, retinanet_anchors


def test_golden_grids_of_mask_rcnn_and_retinanet(case: Any) -> None:
    info, arrays = case("anchors")
    for name, anchors, first in (("rpn", Anchors(), 4), ("retina", retinanet_anchors(), 8)):
        for i, shape in enumerate(info[f"map_sizes_{name}"]):
            np.testing.assert_allclose(anchors.grid(*shape, first * 2**i), arrays[f"{name}_{i}"], atol=1e-4)


def test_golden_flags_of_an_image_smaller_than_its_canvas(case: Any) -> None:
    info, arrays = case("anchors")
    shapes = {4 * 2**i: shape for i, shape in enumerate(info["map_sizes_rpn"])}
    expected = np.concatenate([arrays[f"rpn_valid_{i}"] for i in range(5)])
    flags = jax.jit(lambda size: inside_flags(size, shapes, 3))
    np.testing.assert_array_equal(flags(jnp.asarray([64, 96])), expected)
    np.testing.assert_array_equal(flags(jnp.asarray([33, 65])), expected)  # padded to multiples of 32 first


def test_golden_rounded_anchors_of_torchvision(case: Any) -> None:
    _, arrays = case("anchors")
    base = [Anchors(rounded=True).base(4 * 2**i) for i in range(5)]
    np.testing.assert_array_equal(base, arrays["torchvision_cell"])


def test_flags_of_all_images_at_once() -> None:
    flags = jax.vmap(lambda size: inside_flags(size, {32: (3, 4)}, 2))(jnp.asarray([[96, 128], [32, 64]]))
    assert flags.sum(1).tolist() == [24, 4]


def test_the_anchors_of_a_canvas_of_800_by_1344() -> None:
    sides = [(-(-800 // stride), -(-1344 // stride), stride) for stride in (4, 8, 16, 32, 64)]
    assert sum(Anchors().grid(*side).shape[0] for side in sides) == 268_569
