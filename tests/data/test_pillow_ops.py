"""The operations against Pillow's, on photographs."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from helpers.tiers import tiered
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_image

from halvit_jax.data import pillow_ops

Photos = tuple[Image.Image, Image.Image]
FILL = (124, 116, 104)
RESAMPLE = {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
FACTORS = (0.0, 0.19, 0.55, 1.0, 1.37, 1.81, 1.99)
ANGLES = (-27.3, -9.1, 0.0, 4.6, 30.0, 90.0, 133.7)
SHEARS = (-0.29, -0.173, 0.0, 0.071, 0.3, 0.957)
SHIFTS = (-90.72, -31.0, -0.4, 0.0, 3.3, 97.1, 1000.0)


def enhance(kind: str) -> Callable[..., Image.Image]:
    return lambda photo, factor: getattr(ImageEnhance, kind)(photo).enhance(factor)


def add_below_128(photo: Image.Image, amount: int) -> Image.Image:
    return photo.point([min(255, v + amount) if v < 128 else v for v in range(256)] * 3)


def affine(matrix: Callable[[float], tuple]) -> Callable[..., Image.Image]:
    return lambda photo, level, **warp: photo.transform(photo.size, Image.AFFINE, matrix(level), **warp)


def shift(photo: Image.Image, x: float, y: float, **warp: Any) -> Image.Image:
    return photo.transform(photo.size, Image.AFFINE, (1, 0, x, 0, 1, y), **warp)


# name -> Pillow's operation, levels, allowed mean difference
PILLOW = {
    "invert": (lambda photo, _: ImageOps.invert(photo), (None,), 0),
    "auto_contrast": (lambda photo, _: ImageOps.autocontrast(photo), (None,), 0),
    "equalize": (lambda photo, _: ImageOps.equalize(photo), (None,), 0),
    "grayscale": (lambda photo, _: photo.convert("L").convert("RGB"), (None,), 0),
    "posterize": (ImageOps.posterize, (1, 2, 3, 4, 8), 0),
    "solarize": (ImageOps.solarize, (0, 1, 26, 128, 200, 256), 0),
    "solarize_add": (add_below_128, (0, 33, 99, 110), 0),
    # floats: a machine that fuses multiply and add may cut the fraction elsewhere
    "brightness": (enhance("Brightness"), FACTORS, 0.01),
    "contrast": (enhance("Contrast"), FACTORS, 0.01),
    "color": (enhance("Color"), FACTORS, 0.01),
    "sharpness": (enhance("Sharpness"), FACTORS, 0.01),
    # at deviation 1 all weights are sixths: many values end on a half, which fixed point and float round apart
    "gaussian_blur": (
        lambda photo, sigma: photo.filter(ImageFilter.GaussianBlur(sigma)),
        (0.1, 0.37, 0.9, 1.0, 1.44, 1.71, 2.0, 2.4),
        1.0,
    ),
}
PILLOW_WARPS = {
    "rotate": (lambda photo, degrees, **warp: photo.rotate(degrees, **warp), ANGLES),
    "shear_x": (affine(lambda level: (1, level, 0, 0, 1, 0)), SHEARS),
    "shear_y": (affine(lambda level: (1, 0, 0, level, 1, 0)), SHEARS),
    "translate_x": (lambda photo, pixels, **warp: shift(photo, pixels, 0, **warp), SHIFTS),
    "translate_y": (lambda photo, pixels, **warp: shift(photo, 0, pixels, **warp), SHIFTS),
    "translate_x_rel": (lambda photo, share, **warp: shift(photo, share * photo.width, 0, **warp), (-0.405, 0.0, 0.31)),
    "translate_y_rel": (
        lambda photo, share, **warp: shift(photo, 0, share * photo.height, **warp),
        (-0.405, 0.0, 0.31),
    ),
}


@pytest.fixture(scope="module")
def photos() -> Photos:
    china, flower = (Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg"))
    return china.resize((224, 224), Image.BICUBIC), flower.crop((150, 50, 350, 210))


@pytest.fixture(scope="module")
def small(photos: Photos) -> np.ndarray:
    return np.asarray(photos[1].resize((40, 32)))


def difference(ours: tf.Tensor, theirs: Image.Image) -> np.ndarray:
    ours, theirs = ours.numpy(), np.asarray(theirs)
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape
    return np.abs(ours.astype(int) - theirs.astype(int))


@pytest.mark.parametrize("name", PILLOW)
def test_operation_is_pillows(name: str, photos: Photos) -> None:
    theirs, levels, allowed = PILLOW[name]
    for photo, level in itertools.product(photos, levels):
        given = () if level is None else (level,)
        ours = pillow_ops.OPS[name](tf.constant(np.asarray(photo)), *given)
        assert difference(ours, theirs(photo, level)).mean() <= allowed, level


@pytest.mark.parametrize("interpolation", tiered(RESAMPLE, {"bicubic"}))
@pytest.mark.parametrize("name", PILLOW_WARPS)
def test_warp_is_pillows(name: str, interpolation: str, photos: Photos) -> None:
    theirs, levels = PILLOW_WARPS[name]
    for photo, level in itertools.product(photos, levels):
        image = tf.constant(np.asarray(photo))
        ours = pillow_ops.WARPS[name](image, level, fill=FILL, interpolation=interpolation)
        expected = theirs(photo, level, resample=RESAMPLE[interpolation], fillcolor=FILL)
        differences = difference(ours, expected)
        if level == 0:
            np.testing.assert_array_equal(ours, image)
        elif interpolation == "nearest":  # on a tie, double and single precision may choose another neighbour
            assert (differences > 0).mean() < 0.01, level
        else:
            assert differences.mean() < 0.05, level
            assert differences.max() <= 1, level


def test_flat_and_two_valued_channels_are_pillows() -> None:
    values = np.zeros((12, 10, 3), np.uint8)
    values[..., 0], values[:4, :, 1], values[4:, :, 1], values[0, 0, 2] = 77, 50, 200, 3
    for name in ("auto_contrast", "equalize"):
        assert (
            difference(pillow_ops.OPS[name](tf.constant(values)), PILLOW[name][0](Image.fromarray(values), 0)).max()
            == 0
        )


def test_posterize_to_no_bits_is_black(small: np.ndarray) -> None:
    assert not pillow_ops.posterize(tf.constant(small), 0).numpy().any()


def test_what_a_warp_uncovers_has_the_fill_colour(small: np.ndarray) -> None:
    moved = pillow_ops.translate_x(tf.constant(small), 10, fill=FILL, interpolation="bicubic").numpy()
    np.testing.assert_array_equal(moved[:, :-10], small[:, 10:])
    assert (moved[:, -10:] == FILL).all()
