"""The draws against the definitions of timm and torchvision, and determinism."""

import collections
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from helpers.tiers import tiered
from PIL import Image
from sklearn.datasets import load_sample_image

from halvit_jax.data import augment, pillow_ops

FILL = (124, 116, 104)
POLICIES = {
    "rand": lambda image, seed: augment.rand_augment(image, seed, probability=1.0),
    "rand plain": lambda image, seed: augment.rand_augment(image, seed, increasing=False, magnitude_std=math.inf),
    "trivial": augment.trivial_augment,
    "three": augment.three_augment,
    "jitter": lambda image, seed: augment.color_jitter(image, seed, brightness=0.4, contrast=0.4, saturation=0.4),
}


@pytest.fixture(scope="module")
def small() -> np.ndarray:
    flower = Image.fromarray(load_sample_image("flower.jpg")).crop((150, 50, 350, 210))
    return np.asarray(flower.resize((40, 32)))


def seeds(count: int, dtype: tf.DType = tf.int64) -> list[tf.Tensor]:
    return [tf.constant([17, i], dtype) for i in range(count)]


def in_pipeline(function: Callable[..., Any], image: np.ndarray, count: int) -> list[np.ndarray]:
    """function(image, seed) for seeds(count), within a tf.data pipeline, image of unknown size."""
    data = tf.data.Dataset.range(count).map(lambda i: (tf.ensure_shape(image, [None, None, 3]), tf.stack([17, i])))
    data = data.map(lambda image, seed: function(tf.reshape(image, tf.shape(image)), seed))
    return list(data.as_numpy_iterator())


def draws(function: Callable[..., Any], count: int) -> dict[str, np.ndarray]:
    """Every draw of function(seed), stacked: name -> [count, ...]."""
    data = tf.data.Dataset.range(count).map(lambda i: function(tf.stack([tf.constant(5, tf.int64), i])))
    return next(data.batch(count).as_numpy_iterator())


def assert_frequencies(values: np.ndarray, probabilities: Sequence[float]) -> None:
    """How often each of 0, 1, ... was drawn, to five standard deviations."""
    probabilities = np.asarray(probabilities)
    counts = np.bincount(values.ravel(), minlength=len(probabilities))
    assert len(counts) == len(probabilities)
    expected = values.size * probabilities
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected * (1 - probabilities)) + 1e-9)


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("m", [*range(11), 8.63, 9.41])
def test_levels_are_timms(m: float, sign: float, increasing: bool) -> None:
    fraction = m / 10
    factor = max(0.1, 1 + sign * fraction * 0.9) if increasing else fraction * 1.8 + 0.1
    expected = {
        "rotate": sign * fraction * 30,
        "posterize": 4 - int(fraction * 4) if increasing else int(fraction * 4),
        "solarize": 256 - min(256, int(fraction * 256)) if increasing else min(256, int(fraction * 256)),
        "solarize_add": min(128, int(fraction * 110)),
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), factor),
        **dict.fromkeys(("shear_x", "shear_y"), sign * fraction * 0.3),
        **dict.fromkeys(("translate_x_rel", "translate_y_rel"), sign * fraction * 0.45),
    }
    table = augment.RAND_AUGMENT if increasing else augment.RAND_AUGMENT_PLAIN
    assert [name for name in table if table[name] is None] == ["auto_contrast", "equalize", "invert"]
    levels = {name: level(tf.constant(float(m)), tf.constant(sign)) for name, level in table.items() if level}
    assert {name: float(level) for name, level in levels.items()} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_levels_are_torchvisions(sign: float) -> None:
    shear, shift = np.linspace(0, 0.99, 31), np.linspace(0, 32, 31, dtype=np.float32).astype(int)
    expected = {
        **dict.fromkeys(("shear_x", "shear_y"), sign * shear),
        **dict.fromkeys(("translate_x", "translate_y"), sign * shift),
        "rotate": sign * np.linspace(0, 135, 31),
        **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), 1 + sign * shear),
        "posterize": 8 - np.round(np.arange(31) / 5),
        "solarize": np.linspace(255, 0, 31),
    }
    table = augment.TRIVIAL_AUGMENT
    assert [name for name in table if table[name] is None] == ["identity", "auto_contrast", "equalize"]
    assert {name for name in table if table[name]} == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(table[name](tf.range(31.0), sign), values, rtol=1e-6, atol=1e-6)


def test_rand_augment_draws_as_timm_does() -> None:
    drawn = draws(
        lambda seed: augment.draw_rand_augment(seed, ops=2, magnitude=9, magnitude_std=0.5, probability=0.5), 6000
    )
    assert len(augment.RAND_AUGMENT) == 15
    assert_frequencies(drawn["op"], [0.5 / 15] * 15 + [0.5])
    assert_frequencies(drawn["sign"].astype(int) + 1, [0.5, 0, 0.5])
    pair = drawn["op"][:, 0] // 15 * 2 + drawn["op"][:, 1] // 15  # the two operations are independent of each other
    assert_frequencies(pair, [0.25] * 4)
    assert_frequencies((drawn["sign"] > 0) * 2 + (drawn["op"] < 15), [0.25] * 4)  # and the sign of both
    magnitudes = drawn["magnitude"].ravel()
    assert magnitudes.max() == 10
    assert_frequencies((magnitudes == 10).astype(int), [1 - 0.02275, 0.02275])  # clipped: beyond two deviations
    assert_frequencies(np.searchsorted([8.5, 9.0, 9.5], magnitudes), [0.15866, 0.34134, 0.34134, 0.15866])


def test_rand_augment_magnitude_without_noise_and_uniform() -> None:
    def drawn(std: float) -> dict[str, np.ndarray]:
        return draws(
            lambda seed: augment.draw_rand_augment(seed, ops=2, magnitude=8, magnitude_std=std, probability=1), 2000
        )

    exact, uniform = drawn(0.0), drawn(math.inf)
    assert (exact["magnitude"] == 8).all()
    assert exact["op"].max() == 14
    assert_frequencies((uniform["magnitude"] / 2).astype(int), [0.25] * 4)


def test_trivial_augment_draws_as_torchvision_does() -> None:
    drawn = draws(augment.draw_trivial_augment, 6000)
    assert_frequencies(drawn["op"], [1 / 14] * 14)
    assert_frequencies(drawn["magnitude"].astype(int), [1 / 31] * 31)
    assert_frequencies(drawn["sign"].astype(int) + 1, [0.5, 0, 0.5])


@pytest.mark.parametrize("increasing", [True, False])
def test_rand_augment_applies_what_it_draws(increasing: bool, small: np.ndarray) -> None:
    table = augment.RAND_AUGMENT if increasing else augment.RAND_AUGMENT_PLAIN
    names = [*table, "identity"]
    seen = set()
    for seed in seeds(40):
        expected = tf.constant(small)
        drawn = augment.draw_rand_augment(seed, ops=3, magnitude=7, magnitude_std=0.5, probability=0.8)
        for op, m, sign in zip(*(drawn[key].numpy() for key in ("op", "magnitude", "sign")), strict=True):
            name, level = names[op], table.get(names[op])
            arguments = [level(m, sign)] if level else []
            warp = {"fill": FILL, "interpolation": "bilinear"} if name in pillow_ops.WARPS else {}
            expected = (pillow_ops.WARPS | pillow_ops.OPS)[name](expected, *arguments, **warp)
            seen.add(name)
        ours = augment.rand_augment(
            tf.constant(small),
            seed,
            ops=3,
            magnitude=7,
            probability=0.8,
            increasing=increasing,
            interpolation="bilinear",
        )
        np.testing.assert_array_equal(ours, expected)
    assert seen == set(names)


def test_three_augment_is_one_of_three_equally_often(small: np.ndarray) -> None:
    outcomes = collections.Counter()
    gray, solarized = pillow_ops.grayscale(small).numpy(), pillow_ops.solarize(small, 128).numpy()
    images = in_pipeline(augment.three_augment, small, 300)
    for image in images:
        kind = 0 if (image == gray).all() else 1 if (image == solarized).all() else 2
        outcomes[kind] += 1
        if kind == 2:
            assert np.abs(image.astype(float) - small).mean() < 30
            assert image.std() <= small.std() + 0.1
    assert_frequencies(np.repeat(list(outcomes), list(outcomes.values())), [1 / 3] * 3)


def test_color_jitter_factors() -> None:
    flat = np.full((2, 2, 3), 100, np.uint8)
    values = [image[0, 0, 0] for image in in_pipeline(lambda *a: augment.color_jitter(*a, brightness=0.3), flat, 400)]
    assert 70 <= min(values) < 73
    assert 127 < max(values) <= 130
    assert 98 < np.mean(values) < 102
    values = [image[0, 0, 0] for image in in_pipeline(lambda *a: augment.color_jitter(*a, brightness=2.0), flat, 400)]
    assert min(values) < 10  # the factor never falls below 0
    assert max(values) == 255


def test_color_jitter_order_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("brightness", "contrast", "color"):
        monkeypatch.setitem(pillow_ops.OPS, name, lambda image, _, name=name: (calls.append(name), image)[1])
    for seed in seeds(240):
        augment.color_jitter(tf.zeros([2, 2, 3], tf.uint8), seed, brightness=0.3, contrast=0.3, saturation=0.3)
    orders = list(itertools.permutations(("brightness", "contrast", "color")))
    assert_frequencies(np.array([orders.index(tuple(calls[i : i + 3])) for i in range(0, len(calls), 3)]), [1 / 6] * 6)


def test_augmentations_change_nothing_by_default(small: np.ndarray) -> None:
    image, seed = tf.constant(small), seeds(1)[0]
    np.testing.assert_array_equal(augment.color_jitter(image, seed), small)
    np.testing.assert_array_equal(augment.rand_augment(image, seed, probability=0.0), small)


@pytest.mark.parametrize("name", tiered(POLICIES, {"rand"}))
def test_augmentations_are_the_same_eagerly_and_in_a_pipeline(name: str, small: np.ndarray) -> None:
    count = 40
    eager = [POLICIES[name](tf.constant(small), seed).numpy() for seed in seeds(count)]
    again = in_pipeline(POLICIES[name], small, count)
    np.testing.assert_array_equal(np.stack(eager), np.stack(again))
    assert len({image.tobytes() for image in eager}) > 10


@pytest.mark.parametrize("name", tiered(POLICIES, {"rand"}))
def test_seeds_may_be_int32_and_the_shape_stays_known(name: str, small: np.ndarray) -> None:
    function = tf.function(
        POLICIES[name], input_signature=[tf.TensorSpec([32, 40, 3], tf.uint8), tf.TensorSpec([2], tf.int32)]
    )
    concrete = function.get_concrete_function()
    assert concrete.outputs[0].shape == (32, 40, 3)
    assert concrete.outputs[0].dtype == tf.uint8
    first, again, other = (function(small, seed).numpy() for seed in (*seeds(1, tf.int32), *seeds(2, tf.int32)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rand-m9-mstd0.5-inc1", (2, 9, 0.5, True, 0.5)),
        ("rand-m7-mstd0.5-inc1", (2, 7, 0.5, True, 0.5)),
        ("rand-n3-p0.7-m10", (3, 10, 0, False, 0.7)),
        ("rand-mstd101-inc0-m6.5", (2, 6.5, math.inf, True, 0.5)),  # timm: bool("0")
        ("rand-mstd101-m6.5", (2, 6.5, math.inf, False, 0.5)),
        ("rand", (2, 10, 0, False, 0.5)),
    ],
)
def test_parse_rand_augment(text: str, expected: tuple) -> None:
    names = ("ops", "magnitude", "magnitude_std", "increasing", "probability")
    assert augment.parse_rand_augment(text) == dict(zip(names, expected, strict=True))


def test_deits_rand_augment_gives_the_defaults(small: np.ndarray) -> None:
    seed = tf.constant([1, 2])
    named = augment.rand_augment(tf.constant(small), seed, **augment.parse_rand_augment("rand-m9-mstd0.5-inc1"))
    np.testing.assert_array_equal(named, augment.rand_augment(tf.constant(small), seed))


@pytest.mark.parametrize(
    "text",
    [
        *("", "m9", "augmix-m9", "rand m9", "rand-", "rand-m", "rand-m11", "rand-m-1", "rand-m9-m7", "rand-m9 -inc1"),
        *("rand-n0", "rand-n1.5", "rand-p1.1", "rand-inc2", "rand-mstdx", "rand-x3", "rand-tweights", "rand-mmax10"),
    ],
)
def test_parse_rand_augment_rejects(text: str) -> None:
    with pytest.raises(ValueError, match=r"data\.augment='.*' is not understood"):
        augment.parse_rand_augment(text)


def test_unknown_interpolation_is_an_error(small: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"data\.interpolation='lanczos' is not one of nearest, bilinear, bicubic"):
        augment.rand_augment(tf.constant(small), tf.constant([1, 2]), interpolation="lanczos")
