from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.detection import boxes
from halvit_jax.detection.conventions import MMDET, TORCHVISION, Conventions

STDS = {"rpn": boxes.RPN_STD, "roi": boxes.ROI_STD}


def test_golden_iou_and_iof(case: Any) -> None:
    _, arrays = case("boxes")
    np.testing.assert_allclose(boxes.iou(arrays["b"], arrays["a"]), arrays["iou"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(boxes.iof(arrays["a"], arrays["b"]), arrays["iof_of_a"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", STDS)
def test_golden_codes(case: Any, kind: str) -> None:
    _, arrays = case("boxes")
    codes = boxes.encode(arrays["source"], arrays["target"], STDS[kind])
    np.testing.assert_allclose(codes, arrays[f"encoded_{kind}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", STDS)
@pytest.mark.parametrize(
    ("conventions", "name"), [(MMDET, "decoded_{}_unclipped"), (TORCHVISION, "torchvision_decoded_{}")]
)
def test_golden_decoding(case: Any, kind: str, conventions: Conventions, name: str) -> None:
    info, arrays = case("boxes")
    decoded = boxes.decode(arrays["source"], arrays["deltas"], STDS[kind], clamp_shrinking=conventions.clamp_shrinking)
    np.testing.assert_allclose(decoded, arrays[name.format(kind)], rtol=1e-5, atol=1e-3)
    if conventions is MMDET:
        clipped = boxes.clip(decoded, jnp.asarray(info["clip"]))
        np.testing.assert_allclose(clipped, arrays[f"decoded_{kind}"], rtol=1e-5, atol=1e-3)


def test_decoding_undoes_encoding_under_jit_and_vmap() -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 100, (2, 5, 2, 2))
    a, b = np.moveaxis(np.concatenate([corner, corner + rng.uniform(1, 50, corner.shape)], -1), 2, 0)
    both = jax.jit(jax.vmap(lambda a, b: boxes.decode(a, boxes.encode(a, b))))
    np.testing.assert_allclose(both(a, b), b, atol=1e-3)


def test_boxes_without_area_have_iou_zero_and_finite_gradients() -> None:
    flat = jnp.asarray([[3.0, 3, 3, 9], [5, 5, 5, 5], [9, 9, 4, 4]])
    assert not np.any(jax.jit(boxes.iou)(flat, flat))
    assert not np.any(jax.jit(boxes.area)(flat))
    assert np.isfinite(jax.jit(jax.grad(lambda b: boxes.iou(b, b + 1).sum()))(flat)).all()


def test_no_boxes_are_no_rows() -> None:
    none, some = jnp.zeros((0, 4)), jnp.ones((3, 4))
    assert boxes.iou(none, some).shape == (0, 3)
    assert boxes.encode(none, none).shape == boxes.decode(none, none).shape == (0, 4)


def test_boxes_are_computed_in_float32() -> None:
    half = jnp.asarray([[1300.0, 8, 1340, 24]], jnp.bfloat16)
    for function in (boxes.iou, boxes.encode, boxes.decode):
        assert jax.eval_shape(function, half, half).dtype == jnp.float32


def test_rescaling_goes_back_to_the_original_image() -> None:
    there = boxes.rescale(jnp.asarray([[16.0, 8, 32, 24]]), jnp.asarray([80, 160]), jnp.asarray([40, 40]))
    np.testing.assert_allclose(there, [[4, 4, 8, 12]])
