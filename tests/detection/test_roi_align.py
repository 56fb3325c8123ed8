import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.detection.roi_align import ROI_ALIGN_IMPLS, axis_weights, roi_align, roi_level, window_pixels

every_formulation = pytest.mark.parametrize("formulation", ROI_ALIGN_IMPLS)
LEGACY = {"samples": 2, "aligned": False}


@functools.cache
def _maps(rng: Callable[[str], np.random.Generator]) -> dict[int, jax.Array]:
    """{stride: [image, h, w, c]}."""
    maps = {}
    for i in range(4):
        s = 4 * 2**i
        values = rng(f"roi/level{i}").standard_normal((2, 2, 448 // s, 320 // s)).astype(np.float32)
        maps[s] = jnp.asarray(values.transpose(0, 2, 3, 1))
    return maps


def _pool(maps: Any, arrays: Any, **options: Any) -> jax.Array:
    """Every box from its own image."""
    both = jax.vmap(lambda maps: roi_align(maps, arrays["rois"], **options))(maps)  # [image, n, p, p, c]
    return jnp.take_along_axis(both, arrays["image"][None, :, None, None, None], 0)[0]


@every_formulation
@pytest.mark.parametrize(
    ("name", "options"), [("out7_ratio0_aligned", {}), ("out7_ratio2_legacy", LEGACY)], ids=["aligned", "legacy"]
)
def test_golden_pooled_features_and_gradients(
    case: Any, reference_weights: Any, formulation: str, name: str, options: dict[str, Any]
) -> None:
    _, arrays = case("roi_align")
    shape = (40, 2, 7, 7)
    cotangent = np.cos(0.7 * np.arange(np.prod(shape))).reshape(shape).transpose(0, 2, 3, 1).astype(np.float32)

    def both(maps: Any) -> tuple[jax.Array, Any]:
        pooled, pull = jax.vjp(lambda m: _pool(m, arrays, bins=7, formulation=formulation, **options), maps)
        return pooled, pull(cotangent)[0]

    pooled, gradients = jax.jit(both)(_maps(reference_weights._rng))
    np.testing.assert_allclose(pooled, arrays[name], atol=5e-5)
    for i, gradient in enumerate(gradients.values()):
        np.testing.assert_allclose(gradient, arrays[f"{name}_grad{i}"], atol=5e-5)


@every_formulation
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("out7_ratio2_aligned", {"bins": 7, "samples": 2}),
        ("out7_ratio0_legacy", {"bins": 7, "aligned": False}),
        ("out14_ratio0_aligned", {"bins": 14}),
    ],
)
def test_golden_pooled_features(
    case: Any, reference_weights: Any, formulation: str, name: str, options: dict[str, Any]
) -> None:
    _, arrays = case("roi_align")
    pool = jax.jit(lambda maps: _pool(maps, arrays, formulation=formulation, **options))
    np.testing.assert_allclose(pool(_maps(reference_weights._rng)), arrays[name], atol=5e-5)


def test_golden_levels(case: Any) -> None:
    _, arrays = case("roi_align")
    np.testing.assert_array_equal(roi_level(arrays["rois"], 4), arrays["level"])
    np.testing.assert_array_equal(roi_level(arrays["rois"], 4, inside=False), arrays["torchvision_level"])


@pytest.mark.parametrize(("bins", "samples"), [(7, 0), (7, 2), (3, 0), (1, 0)])
def test_axis_weights_are_the_mean_of_the_samples_one_by_one(bins: int, samples: int) -> None:
    rng = np.random.default_rng(bins)
    size = 20
    intervals = [*rng.uniform((-4, 0), (20, 40), (60, 2)), (-1, 2 * bins), (0, bins), (18.5, 3), (5, 0)]
    intervals = np.asarray(intervals, np.float32)
    found = jax.jit(lambda x: axis_weights(x[:, 0], x[:, 1], bins, size, samples=samples))(intervals)
    for (start, length), weights in zip(intervals, found, strict=True):
        count = samples or int(np.ceil(length / np.float32(bins)))
        expected = np.zeros((bins, size))
        for i in range(bins):
            for k in range(count):
                x = start + i * length / bins + (k + 0.5) * length / bins / count
                if -1 <= x <= size:
                    x = np.clip(x, 0, size - 1)
                    expected[i] += np.maximum(1 - np.abs(x - np.arange(size)), 0) / count
        np.testing.assert_allclose(weights, expected, atol=2e-5)


@pytest.mark.parametrize("shape", [(20, 34), (34, 20), (5, 60)])
def test_windows_hold_boxes_of_any_shape(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    maps = {s: jnp.asarray(rng.standard_normal((-(-shape[0] * 8 // s), -(-shape[1] * 8 // s), 3))) for s in (8, 16, 32)}
    rows, columns = shape[0] * 8, shape[1] * 8
    x, y = rng.uniform(0, columns, (2, 150)), rng.uniform(0, rows, (2, 150))
    boxes = np.stack([x.min(0), y.min(0), x.max(0), y.max(0)], -1).astype(np.float32)
    boxes[:40, 2], boxes[:40, 0] = columns, 0  # as wide as the map
    boxes[20:60, 3], boxes[20:60, 1] = rows, 0  # as high
    boxes[:20, 3] = boxes[:20, 1] + rng.uniform(0, 40, 20)
    a, b = (jax.jit(lambda m, f=f: roi_align(m, boxes, bins=7, formulation=f))(maps) for f in ("dense", "window"))
    np.testing.assert_allclose(a, b, atol=5e-5)  # a position near 60 is known to 4e-6, and counts in several weights


def test_windows_are_small_at_the_size_of_coco() -> None:
    assert window_pixels([(200, 336), (100, 168), (50, 84), (25, 42)], 4) == 1680


@every_formulation
def test_boxes_get_no_gradient_and_none_may_be_given(formulation: str) -> None:
    maps = {4: np.ones((6, 6, 1), np.float32), 8: np.ones((3, 3, 1), np.float32)}
    boxes = jnp.asarray([[0.0, 0, 8, 8], [4, 4, 4, 4], [40, 40, 80, 80]])
    pool = jax.jit(lambda boxes: roi_align(jax.tree.map(jnp.asarray, maps), boxes, bins=2, formulation=formulation))
    np.testing.assert_allclose(np.sum(pool(boxes), (1, 2, 3)), [4, 0, 0], atol=1e-6)
    assert not np.any(jax.jit(jax.grad(lambda b: pool(b).sum()))(boxes))
    assert pool(jnp.zeros((0, 4))).shape == (0, 2, 2, 1)


@every_formulation
def test_features_in_bfloat16_stay_so(formulation: str) -> None:
    maps, boxes = {4: jnp.ones((6, 6, 1), jnp.bfloat16)}, jnp.ones((1, 4))
    pooled = jax.eval_shape(lambda: roi_align(maps, boxes, bins=2, formulation=formulation))
    assert pooled.dtype == jnp.bfloat16
