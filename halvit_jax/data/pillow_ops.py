"""Pillow's operations on one image, equal to the rounding.

An image is a uint8 tensor [h, w, 3]. `OPS` and `WARPS` hold all by name; a warp also takes the interpolation and the
colour of pixels from outside of the image.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

Color = tuple[int, int, int]

# Operations on each value by itself.


def identity(image: tf.Tensor) -> tf.Tensor:
    """The image."""
    return image


def invert(image: tf.Tensor) -> tf.Tensor:
    """255 - x."""
    return 255 - image


def posterize(image: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keep the `bits` highest bits, 0 to 8; with none the image is black (as in older Pillow; the newest refuses)."""
    lowest = tf.bitwise.left_shift(1, 8 - tf.cast(bits, tf.int32))  # the lowest bit kept
    return tf.bitwise.bitwise_and(image, tf.cast(256 - lowest, tf.uint8))


def solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Invert the values at or above the threshold, 0 to 256."""
    above = tf.cast(image, tf.float32) >= tf.cast(threshold, tf.float32)
    return tf.bitwise.bitwise_xor(image, 255 * tf.cast(above, tf.uint8))


def solarize_add(image: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    """Add `amount`, 0 to 128, to the values below 128."""
    return image + tf.cast(amount, tf.uint8) * tf.cast(image < 128, tf.uint8)


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
    """Stretch each channel to the whole range 0 to 255."""
    pixels = tf.reshape(image, [-1, 3])
    low = tf.cast(tf.reduce_min(pixels, 0), tf.float64)[:, None]
    high = tf.cast(tf.reduce_max(pixels, 0), tf.float64)[:, None]
    values = tf.range(256, dtype=tf.float64)
    scale = 255.0 / tf.maximum(high - low, 1.0)
    return _look_up(image, tf.where(high > low, values * scale - low * scale, values))


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Make the values of each channel occur equally often."""
    bins = tf.reshape(_by_channel(image), [-1])
    counts = tf.reshape(tf.math.bincount(bins, minlength=768, maxlength=768), [3, 256])
    brightest = tf.gather(counts, tf.cast(tf.reduce_max(tf.reshape(image, [-1, 3]), 0), tf.int32), batch_dims=1)
    step = (tf.reduce_sum(counts, 1) - brightest)[:, None] // 255
    table = (step // 2 + tf.cumsum(counts, 1, exclusive=True)) // tf.maximum(step, 1)
    return _look_up(image, tf.where(step > 0, table, tf.range(256)))


# Operations that blend the image with a degraded one; factor 1 changes nothing, 0 gives the degraded one.


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blend with black."""
    return _blend(0.0, image, factor)


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blend with the mean of the gray image."""
    gray = tf.cast(_gray(image), tf.int64)  # whole numbers: no summing order, no thread count can change the mean
    mean = tf.cast(tf.reduce_sum(gray), tf.float64) / tf.cast(tf.size(gray), tf.float64)
    return _blend(tf.cast(tf.floor(mean + 0.5), tf.float32), image, factor)


def color(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blend with the gray image."""
    return _blend(tf.cast(_gray(image), tf.float32), image, factor)


def grayscale(image: tf.Tensor) -> tf.Tensor:
    """The gray image, in all three channels."""
    return tf.repeat(tf.cast(_gray(image), tf.uint8), 3, axis=-1)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blend with the image smoothed by a 3 x 3 kernel (5 in the middle, 1 around, over 13; the border is kept)."""
    x = tf.cast(image, tf.float32)
    inner = x[1:-1, 1:-1]
    box = x[:-2] + x[1:-1] + x[2:]
    box = box[:, :-2] + box[:, 1:-1] + box[:, 2:]
    smooth = tf.floor((box + 4.0 * inner) * (1 / 13) + 0.5)
    return _blend(x + tf.pad(smooth - inner, [[1, 1], [1, 1], [0, 0]]), image, factor)


def gaussian_blur(image: tf.Tensor, sigma: tf.Tensor) -> tf.Tensor:
    """Blur by a Gaussian of deviation `sigma` pixels (up to 2.4) as Pillow does, by three fractional box blurs."""
    variance = tf.square(tf.cast(sigma, tf.float32)) / 3.0
    whole = tf.floor((tf.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)  # 0 or 1
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - tf.square(whole + 1)))
    near = 1.0 / (2.0 * (whole + part) + 1.0)
    far = 0.5 * (1.0 - (2.0 * whole + 1.0) * near)
    beside, beyond = tf.where(whole > 0, near, far), tf.where(whole > 0, -far, 0.0)  # at distance 1, and minus at 2
    x = tf.cast(image, tf.float32)
    for axis in (1, 0):
        n = tf.shape(x)[axis]
        for _ in range(3):
            padded = tf.gather(x, tf.clip_by_value(tf.range(-2, n + 2), 0, n - 1), axis=axis)
            at = [padded[:, k : k + n] if axis == 1 else padded[k : k + n] for k in range(5)]
            # Two sums and a difference, which TensorFlow's graph optimizer does not reorder.
            x = tf.floor((near * at[2] + beside * (at[1] + at[3])) - beyond * (at[0] + at[4]) + 0.5)
    return tf.cast(x, tf.uint8)


# Geometric operations: the output at (x, y) is the image at a place computed from (x, y). Places are float64,
# as in Pillow, and so that no reordering by TensorFlow's graph optimizer reaches the float32 weights made of them.


def shear_x(image: tf.Tensor, factor: tf.Tensor, *, fill: Color, interpolation: str) -> tf.Tensor:
    """Shear along x: row y is read from `factor` * y further right."""
    h, w = _sides(image)
    offset = tf.cast(factor, tf.float64) * (_range(h) + 0.5)
    return _warp(image, _range(w)[None, :] + offset[:, None], None, fill=fill, interpolation=interpolation)


def shear_y(image: tf.Tensor, factor: tf.Tensor, *, fill: Color, interpolation: str) -> tf.Tensor:
    """Shear along y: column x is read from `factor` * x further down."""
    h, w = _sides(image)
    offset = tf.cast(factor, tf.float64) * (_range(w) + 0.5)
    return _warp(image, None, _range(h)[:, None] + offset[None, :], fill=fill, interpolation=interpolation)


def translate_x(image: tf.Tensor, pixels: tf.Tensor, *, fill: Color, interpolation: str) -> tf.Tensor:
    """Translate along x: every pixel is read from `pixels` further right."""
    u = (_range(_sides(image)[1]) + tf.cast(pixels, tf.float64))[None, :]
    return _warp(image, u, None, fill=fill, interpolation=interpolation)


def translate_y(image: tf.Tensor, pixels: tf.Tensor, *, fill: Color, interpolation: str) -> tf.Tensor:
    """Translate along y: every pixel is read from `pixels` further down."""
    v = (_range(_sides(image)[0]) + tf.cast(pixels, tf.float64))[:, None]
    return _warp(image, None, v, fill=fill, interpolation=interpolation)


def translate_x_rel(image: tf.Tensor, fraction: tf.Tensor, **warp: Any) -> tf.Tensor:
    """Translate by a fraction of the image's width."""
    return translate_x(image, tf.cast(fraction, tf.float64) * tf.cast(_sides(image)[1], tf.float64), **warp)


def translate_y_rel(image: tf.Tensor, fraction: tf.Tensor, **warp: Any) -> tf.Tensor:
    """Translate by a fraction of the image's height."""
    return translate_y(image, tf.cast(fraction, tf.float64) * tf.cast(_sides(image)[0], tf.float64), **warp)


def rotate(image: tf.Tensor, degrees: tf.Tensor, *, fill: Color, interpolation: str) -> tf.Tensor:
    """Rotate counter-clockwise about the centre."""
    h, w = _sides(image)
    angle = tf.cast(degrees, tf.float64) * (math.pi / 180)
    x_middle, y_middle = tf.cast(w - 1, tf.float64) / 2, tf.cast(h - 1, tf.float64) / 2
    x, y = (_range(w) - x_middle)[None, :], (_range(h) - y_middle)[:, None]
    u = tf.cos(angle) * x - tf.sin(angle) * y + x_middle
    v = tf.sin(angle) * x + tf.cos(angle) * y + y_middle
    return _warp(image, u, v, fill=fill, interpolation=interpolation)


# The weights of the pixels around a place that lies d, in [0, 1), after one of them: the middle two, or the only one.
# Of four, the outer two are to be subtracted. Bicubic has a = -1, as Pillow's transform; Pillow's resize has -0.5.
INTERPOLATIONS: dict[str, Callable[[tf.Tensor], list[tf.Tensor]]] = {
    "nearest": lambda d: [tf.ones_like(d)],
    "bilinear": lambda d: [1 - d, d],
    "bicubic": lambda d: [d * (1 - d) * (1 - d), d * d * (d - 2) + 1, d * (d * (1 - d) + 1), d * d * (1 - d)],
}


_POINTWISE = (identity, invert, posterize, solarize, solarize_add, auto_contrast, equalize)
_BLENDS = (brightness, contrast, color, grayscale, sharpness, gaussian_blur)
OPS: dict[str, Callable[..., tf.Tensor]] = {op.__name__: op for op in (*_POINTWISE, *_BLENDS)}
_WARPS = (rotate, shear_x, shear_y, translate_x, translate_y, translate_x_rel, translate_y_rel)
WARPS: dict[str, Callable[..., tf.Tensor]] = {op.__name__: op for op in _WARPS}


def _sides(image: tf.Tensor) -> list[tf.Tensor]:
    """Height and width."""
    return tf.unstack(tf.shape(image)[:2])


def _range(n: tf.Tensor) -> tf.Tensor:
    return tf.range(tf.cast(n, tf.float64))


def _by_channel(image: tf.Tensor) -> tf.Tensor:
    """Each value's place in a list of 256 entries for red, then for green, then for blue: int32 [h, w * 3]."""
    w = tf.shape(image)[1]
    return tf.cast(tf.reshape(image, [-1, 3 * w]), tf.int32) + tf.tile(tf.constant([0, 256, 512]), [w])


def _look_up(image: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
    """table[channel, value], of a table [3, 256]."""
    table = tf.reshape(tf.cast(tf.clip_by_value(table, 0, 255), tf.uint8), [-1])
    return tf.reshape(tf.gather(table, _by_channel(image)), tf.shape(image))


def _gray(image: tf.Tensor) -> tf.Tensor:
    """Luma (ITU-R 601) in Pillow's fixed point, int32 [h, w, 1]."""
    red, green, blue = tf.split(tf.cast(image, tf.int32), 3, axis=-1)
    return tf.bitwise.right_shift(19595 * red + 38470 * green + 7471 * blue + 32768, 16)


def _blend(poorer: tf.Tensor | float, image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    mixed = poorer + tf.cast(factor, tf.float32) * (tf.cast(image, tf.float32) - poorer)
    return tf.cast(tf.clip_by_value(mixed, 0.0, 255.0), tf.uint8)


def _taps(place: tf.Tensor, size: tf.Tensor, interpolation: str) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """The pixels that count at a place between 0 and `size`, each int32 of its shape, and their weights [..., 1]."""
    floor = tf.floor(place + 0.5 if interpolation == "nearest" else place)
    weights = INTERPOLATIONS[interpolation](tf.cast(place - floor, tf.float32))
    first = tf.cast(floor, tf.int32) - (len(weights) - 1) // 2
    taps = [tf.clip_by_value(first + k, 0, size - 1) for k in range(len(weights))]
    return taps, [weight[..., None] for weight in weights]


def _mix(weights: list[tf.Tensor] | None, taps: list[tf.Tensor]) -> tf.Tensor:
    """The weighted sum, bicubic's outer taps subtracted; without weights the one tap there is."""
    if weights is None:
        return taps[0]
    parts = [weight * tap for weight, tap in zip(weights, taps, strict=True)]
    if len(parts) == 4:
        return (parts[1] + parts[2]) - (parts[0] + parts[3])
    return parts[0] + parts[1] if len(parts) == 2 else parts[0]


@functools.partial(tf.function, jit_compile=True, autograph=False)
def _warp(image: tf.Tensor, u: tf.Tensor | None, v: tf.Tensor | None, *, fill: Color, interpolation: str) -> tf.Tensor:
    """The image at the columns u and rows v, float64 [h or 1, w or 1]; None: at its own.

    Compiled by XLA: one loop instead of some forty operations that each write the whole image, a third of the time.
    """
    h, w = _sides(image)
    columns, x_weights = _taps(u, w, interpolation) if u is not None else ([tf.range(w)[None, :]], None)
    rows, y_weights = _taps(v, h, interpolation) if v is not None else ([tf.range(h)[:, None]], None)
    pixels = tf.reshape(image, [-1, 3])
    lines = [[tf.cast(tf.gather(pixels, row * w + column), tf.float32) for column in columns] for row in rows]
    values = _mix(y_weights, [_mix(x_weights, line) for line in lines])
    # Pillow truncates; 1/1024 keeps float32's rounding from turning a flat 200 into 199.
    values = tf.cast(tf.clip_by_value(values + 1 / 1024, 0.0, 255.0), tf.uint8)
    inside = tf.constant(True)
    for place, size in ((u, w), (v, h)):
        if place is not None:
            inside &= (place >= -0.5) & (place < tf.cast(size, tf.float64) - 0.5)
    return tf.where(inside[..., None], values, tf.constant(fill, tf.uint8))
