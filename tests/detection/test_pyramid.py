from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.detection.pyramid import (
    FPN,
    NECKS,
    Enlarge,
    FeatureNorms,
    PlainPyramid,
    SHViTPyramid,
    nearest,
)

CASES = {
    "mmdet": (FPN(16), (4, 8, 16, 32)),
    "retina": (FPN(16, "conv"), (4, 8, 16, 32)),
    "shvit_maskrcnn": (SHViTPyramid(16), (16, 32, 64)),
    "shvit_retina": (SHViTPyramid(16, "conv"), (16, 32, 64)),
}


def _place(name: str, strides: list[int], retina: bool) -> tuple[str, str]:
    """Our module and array of mmdetection's name."""
    kind, i, *_, array = name.split(".")
    number = int(i)
    if kind == "extra_trans_convs":
        return f"enlarge{strides[0] // 2 ** (number + 1)}", array
    if kind == "extra_fpn_convs":  # the first belongs to the finest map
        finest = strides[0] // (2 if retina else 4)
        return f"output{finest * 2**number}", array
    return f"{'lateral' if kind == 'lateral_convs' else 'output'}{strides[0] * 2**number}", array


@pytest.mark.parametrize("name", CASES)
def test_golden_pyramids(case: Any, reference_weights: Any, name: str) -> None:
    info, arrays = case("fpn")
    neck, strides = CASES[name]
    shapes = [(30, 24), (15, 12), (8, 6), (4, 3)]
    maps = {}
    for i, (channels, shape) in list(enumerate(zip(info["channels"], shapes, strict=True)))[-len(strides) :]:
        values = reference_weights._rng(f"fpn/in{i}").standard_normal((2, channels, *shape)).astype(np.float32)
        maps[strides[i - 4]] = jnp.asarray(values.transpose(0, 2, 3, 1))
    used = [s for s in strides if s >= 8 or name != "retina"]
    params: dict[str, Any] = {}
    for entry, shape in info[f"{name}_state"].items():
        module, array = _place(entry, used, "retina" in name)
        values = reference_weights.weights(entry, tuple(shape))
        if array == "weight":
            values = values.transpose((2, 3, 0, 1) if "trans" in entry else (2, 3, 1, 0))
        params.setdefault(module, {})["kernel" if array == "weight" else "bias"] = values
    levels = jax.jit(neck.apply)({"params": params}, maps)
    for i, values in enumerate(levels.values()):
        expected = arrays[f"{name}_{i}"]
        difference = np.abs(values[:1, ..., ::4] - expected).max()
        assert difference <= 1e-5 * max(expected.std(), 1), (i, difference)
    assert len(levels) == 5


def test_nearest_enlargement_follows_the_formula_at_all_sizes() -> None:
    x, sizes = jnp.arange(7.0).reshape(1, 7, 1, 1), (7, 8, 13, 14, 15, 28)
    for rows, found in zip(sizes, jax.jit(lambda: [nearest(x, size, 1) for size in sizes])(), strict=True):
        np.testing.assert_array_equal(found[0, :, 0, 0], np.arange(rows) * 7 // rows)


def test_laterals_of_a_plain_backbone_may_come_before_enlargement() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 4, 3)), jnp.float32)
    neck = PlainPyramid(6)
    params = jax.jit(neck.init)(jax.random.key(0), {16: x})["params"]
    large = {16 // f: jax.image.resize(x, (1, 5 * f, 4 * f, 3), "bilinear") for f in (1, 2, 4)}
    fpn = jax.jit(FPN(6).apply)({"params": params}, large)
    levels = jax.jit(neck.apply)({"params": params}, {16: x})
    np.testing.assert_allclose(levels[4], fpn[4], atol=1e-5)
    assert {s: level.shape[1:3] for s, level in levels.items()} == {
        4: (20, 16),
        8: (10, 8),
        16: (5, 4),
        32: (3, 2),
        64: (2, 1),
    }


def test_a_plain_backbone_of_stride_8_has_the_standard_strides_too() -> None:
    neck = PlainPyramid(6)
    shapes = jax.eval_shape(lambda x: neck.init_with_output(jax.random.key(0), {8: x})[0], jnp.zeros((1, 24, 16, 3)))
    assert {s: shape.shape[1:3] for s, shape in shapes.items()} == {
        4: (48, 32),
        8: (24, 16),
        16: (12, 8),
        32: (6, 4),
        64: (3, 2),
    }


@pytest.mark.parametrize("extra", ["pool", "conv"])
def test_a_plain_backbone_with_four_laterals(extra: str) -> None:
    neck = NECKS["plain4"](8, extra=extra)
    shapes = jax.eval_shape(lambda x: neck.init_with_output(jax.random.key(0), {16: x})[0], jnp.zeros((1, 6, 8, 3)))
    first = 8 if extra == "conv" else 4
    assert list(shapes) == [first * 2**i for i in range(5)]
    assert [shape.shape[1] for shape in shapes.values()] == [96 // s for s in (4, 8, 16, 32) if s >= first] + (
        [2, 1] if extra == "conv" else [2]
    )


def test_retinanet_on_a_plain_backbone_needs_four_laterals() -> None:
    with pytest.raises(ValueError, match="plain4"):
        NECKS["plain"](8, extra="conv").init(jax.random.key(0), {16: jnp.zeros((1, 4, 4, 3))})


@pytest.mark.parametrize(
    ("neck", "channels", "extra", "count"),
    [
        ("fpn", (64, 128, 320, 512), "pool", 2_623_488),
        ("fpn", (256, 512, 1024, 2048), "pool", 3_344_384),
        (
            "fpn",
            (64, 128, 320, 512),
            "conv",
            3 * 590_080 + 256 * 9 * 512 + 256 + 590_080 + 256 * (128 + 320 + 512) + 768,
        ),
        ("shvit", (224, 336, 448), "pool", 3_734_016),
        ("shvit", (224, 336, 448), "conv", 2_881_536),
        ("plain", (384,), "pool", 2_065_920),
        ("plain", (768,), "pool", 2_360_832),
    ],
)
def test_counts_of_necks(neck: str, channels: tuple[int, ...], extra: str, count: int) -> None:
    first = 4 if neck == "fpn" else 16
    maps = {first * 2**i: jnp.zeros((1, 8 // 2**i, 8 // 2**i, c)) for i, c in enumerate(channels)}
    shapes = jax.eval_shape(lambda: NECKS[neck](extra=extra).init(jax.random.key(0), maps))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_transposed_convolution_writes_four_pixels_for_each() -> None:
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 3, 2, 4)), jnp.float32)
    y, variables = jax.jit(Enlarge(5).init_with_output)(jax.random.key(0), x)
    x, y, kernel = (np.asarray(a) for a in (x, y, variables["params"]["kernel"]))
    for i, j in np.ndindex(6, 4):
        np.testing.assert_allclose(y[0, i, j], x[0, i // 2, j // 2] @ kernel[i % 2, j % 2], atol=1e-5)


def test_norms_are_one_for_each_map() -> None:
    maps = {4: jnp.full((1, 2, 2, 6), 3.0).at[..., 0].set(1), 8: jnp.zeros((1, 1, 1, 12))}
    normed, variables = jax.jit(FeatureNorms().init_with_output)(jax.random.key(0), maps)
    assert {s: p["scale"].shape for s, p in variables["params"].items()} == {"norm4": (6,), "norm8": (12,)}
    np.testing.assert_allclose(normed[4].mean(-1), 0, atol=1e-5)
