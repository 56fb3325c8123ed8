"""Random changes to one training image: RandAugment, TrivialAugment, 3-Augment and colour jitter.

Everything is a pure function of (image, seed), the same eagerly and inside `tf.data.Dataset.map`. An image is a uint8
tensor [h, w, 3], a seed an integer tensor [2]; every draw is stateless, so one seed gives one result on any host.

Each operation computes what Pillow computes, to the rounding, because the recipes we reproduce were tuned on Pillow.
A policy is a table: name of the operation -> its level, as a function of the drawn magnitude and sign (None: the
operation has no level). Only the operation drawn is run.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from halvit_jax.data.ops import fold_in

Color = tuple[int, int, int]
Level = Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None  # (magnitude, sign) -> level


def rand_augment(
    image: tf.Tensor,
    seed: tf.Tensor,
    *,
    ops: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    increasing: bool = True,
    probability: float = 0.5,
    fill: Color = (124, 116, 104),
    interpolation: str = "bicubic",
) -> tf.Tensor:
    """RandAugment (arXiv 1909.13719) as in timm; the defaults are DeiT's `rand-m9-mstd0.5-inc1`.

    `ops` operations in turn, each drawn uniformly from 15 and applied with `probability`, at a magnitude
    N(`magnitude`, `magnitude_std`) clipped to [0, 10] (an infinite deviation: uniform in [0, `magnitude`]).
    `increasing`: a larger magnitude always changes the image more. `fill` is the colour of what a warp uncovers.
    """
    table = RAND_AUGMENT if increasing else RAND_AUGMENT_PLAIN
    draws = draw_rand_augment(seed, ops=ops, magnitude=magnitude, magnitude_std=magnitude_std, probability=probability)
    return _apply(image, table, draws, fill=fill, interpolation=interpolation)


def draw_rand_augment(
    seed: tf.Tensor, *, ops: int, magnitude: float, magnitude_std: float, probability: float
) -> dict[str, tf.Tensor]:
    """What `rand_augment` draws, each [ops]: `op` (place in RAND_AUGMENT; its length: none), `magnitude`, `sign`."""
    uniform = _uniform([4, ops], seed)
    if math.isinf(magnitude_std):
        magnitudes = magnitude * uniform[3]
    else:
        noise = tf.random.stateless_normal([ops], fold_in(seed, 1), alg="philox")
        magnitudes = tf.clip_by_value(magnitude + magnitude_std * noise, 0.0, 10.0)
    names = tf.cast(uniform[0] * len(RAND_AUGMENT), tf.int32)
    return {
        "op": tf.where(uniform[1] < probability, names, len(RAND_AUGMENT)),
        "magnitude": magnitudes,
        "sign": _sign(uniform[2]),
    }


def parse_rand_augment(text: str) -> dict[str, Any]:
    """Read timm's name of a RandAugment, such as "rand-m9-mstd0.5-inc1", as keyword arguments of `rand_augment`.

    Sections, in any order: m magnitude (10 if not given), mstd its deviation (0; above 100: uniform magnitudes), inc
    increasing (0), n operations (2), p probability (0.5).
    """
    first, *sections = text.split("-")
    given = {}
    for section in sections:
        for pattern, (name, convert) in _SECTIONS.items():
            match = re.fullmatch(pattern, section)
            if match and name not in given:
                given[name] = convert(match[1])
    if first != "rand" or len(given) != len(sections):
        raise ValueError(
            f"data.rand_augment={text!r} is not understood; give 'rand' and, each at most once, joined by '-': "
            "m0 to m10, mstd<number>, inc0 or inc1, n1 to n99, p0 to p1; for example 'rand-m9-mstd0.5-inc1'"
        )
    return {"ops": 2, "magnitude": 10.0, "magnitude_std": 0.0, "increasing": False, "probability": 0.5} | given


def trivial_augment(
    image: tf.Tensor, seed: tf.Tensor, *, fill: Color = (0, 0, 0), interpolation: str = "bilinear"
) -> tf.Tensor:
    """TrivialAugment Wide (arXiv 2103.10158) as in torchvision: one of 14 operations at one of 31 magnitudes.

    The defaults are those of torchvision's reference recipe (its class alone would take nearest neighbours).
    """
    return _apply(image, TRIVIAL_AUGMENT, draw_trivial_augment(seed), fill=fill, interpolation=interpolation)


def draw_trivial_augment(seed: tf.Tensor) -> dict[str, tf.Tensor]:
    """What `trivial_augment` draws, each [1]: `op` (place in TRIVIAL_AUGMENT), `magnitude` (0, 1, ... 30), `sign`."""
    uniform = _uniform([3, 1], seed)
    return {
        "op": tf.cast(uniform[0] * len(TRIVIAL_AUGMENT), tf.int32),
        "magnitude": tf.floor(uniform[1] * 31.0),
        "sign": _sign(uniform[2]),
    }


def three_augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """3-Augment (DeiT III, arXiv 2204.07118): grayscale, solarize at 128, or blur by 0.1 to 2 pixels, a third each."""
    uniform = _uniform([2, 1], seed)
    draws = {"op": tf.cast(uniform[0] * len(THREE_AUGMENT), tf.int32), "magnitude": uniform[1], "sign": tf.ones([1])}
    return _apply(image, THREE_AUGMENT, draws)


def color_jitter(
    image: tf.Tensor, seed: tf.Tensor, *, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0
) -> tf.Tensor:
    """Brightness, contrast and saturation in random order, each by a factor uniform in [max(0, 1 - v), 1 + v]."""
    strengths = {"brightness": brightness, "contrast": contrast, "color": saturation}
    strengths = {name: value for name, value in strengths.items() if value > 0}
    uniform = _uniform([2, len(strengths)], seed)
    low = [max(0.0, 1.0 - value) for value in strengths.values()]
    high = [1.0 + value for value in strengths.values()]
    order = tf.argsort(uniform[0])
    factors = tf.gather(low + tf.subtract(high, low) * uniform[1], order)
    table = {name: lambda factor, sign: factor for name in strengths}
    return _apply(image, table, {"op": order, "magnitude": factors, "sign": tf.ones_like(factors)})


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


# Operations that blend the image with a poorer one; factor 1 changes nothing, 0 leaves the poorer one.


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
    """Blend with the image smoothed by a 3 x 3 kernel (5 in the middle, 1 around, over 13; the border stays)."""
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
    weights = [near, tf.where(whole > 0, near, far), tf.where(whole > 0, far, 0.0)]  # at distance 0, 1, 2
    x = tf.cast(image, tf.float32)
    for axis in (1, 0):
        n = tf.shape(x)[axis]
        for _ in range(3):
            padded = tf.gather(x, tf.clip_by_value(tf.range(-2, n + 2), 0, n - 1), axis=axis)
            at = [padded[:, k : k + n] if axis == 1 else padded[k : k + n] for k in range(5)]
            x = tf.floor(weights[0] * at[2] + weights[1] * (at[1] + at[3]) + weights[2] * (at[0] + at[4]) + 0.5)
    return tf.cast(x, tf.uint8)


# Operations that move pixels: the output at (x, y) is the image at a place computed from (x, y). Places are float64,
# as in Pillow, and so that no reordering by TensorFlow's graph optimizer reaches the float32 weights made of them.


def shear_x(image: tf.Tensor, factor: tf.Tensor, *, fill: Color, interpolation: str) -> tf.Tensor:
    """Take row y from `factor` * y further right."""
    return _slide(image, tf.cast(factor, tf.float64) * (_range(tf.shape(image)[0]) + 0.5), 1, fill, interpolation)


def shear_y(image: tf.Tensor, factor: tf.Tensor, *, fill: Color, interpolation: str) -> tf.Tensor:
    """Take column x from `factor` * x further down."""
    return _slide(image, tf.cast(factor, tf.float64) * (_range(tf.shape(image)[1]) + 0.5), 0, fill, interpolation)


def translate_x(image: tf.Tensor, pixels: tf.Tensor, *, fill: Color, interpolation: str) -> tf.Tensor:
    """Take every pixel from `pixels` further right."""
    return _slide(image, tf.cast(pixels, tf.float64)[None], 1, fill, interpolation)


def translate_y(image: tf.Tensor, pixels: tf.Tensor, *, fill: Color, interpolation: str) -> tf.Tensor:
    """Take every pixel from `pixels` further down."""
    return _slide(image, tf.cast(pixels, tf.float64)[None], 0, fill, interpolation)


def translate_x_rel(image: tf.Tensor, share: tf.Tensor, **warp: Any) -> tf.Tensor:
    """Translate by a share of the image's width."""
    return translate_x(image, tf.cast(share, tf.float64) * tf.cast(tf.shape(image)[1], tf.float64), **warp)


def translate_y_rel(image: tf.Tensor, share: tf.Tensor, **warp: Any) -> tf.Tensor:
    """Translate by a share of the image's height."""
    return translate_y(image, tf.cast(share, tf.float64) * tf.cast(tf.shape(image)[0], tf.float64), **warp)


def rotate(image: tf.Tensor, degrees: tf.Tensor, *, fill: Color, interpolation: str) -> tf.Tensor:
    """Turn counter-clockwise about the centre."""
    h, w = tf.unstack(tf.shape(image)[:2])
    angle = tf.cast(degrees, tf.float64) * (math.pi / 180)
    x_middle, y_middle = tf.cast(w - 1, tf.float64) / 2, tf.cast(h - 1, tf.float64) / 2
    x, y = (_range(w) - x_middle)[None, :], (_range(h) - y_middle)[:, None]
    u = tf.cos(angle) * x - tf.sin(angle) * y + x_middle
    v = tf.sin(angle) * x + tf.cos(angle) * y + y_middle
    left, x_weights = _taps(u, interpolation)
    top, y_weights = _taps(v, interpolation)
    # One gather for all taps of a row: neighbours lie side by side in `runs`, whose first starts at column -2.
    taps = len(x_weights)
    wide = tf.gather(image, tf.clip_by_value(tf.range(-2, w + taps), 0, w - 1), axis=1)
    runs = tf.reshape(tf.concat([wide[:, k : k + w + 2] for k in range(taps)], axis=-1), [-1, 3 * taps])
    column = tf.clip_by_value(left + 2, 0, w + 1)
    rows = [tf.clip_by_value(top + k, 0, h - 1) * (w + 2) for k in range(taps)]
    gathered = [tf.cast(tf.gather(runs, row + column), tf.float32) for row in rows]
    run = tf.add_n([weight * tap for weight, tap in zip(y_weights, gathered, strict=True)])
    total = tf.add_n([weight * run[..., 3 * k : 3 * k + 3] for k, weight in enumerate(x_weights)])
    return _fill_outside(total, _inside(u, w) & _inside(v, h), fill)


# The weights of the pixels around a place that lies d, in [0, 1), after one of them: the middle two, or the only one.
INTERPOLATIONS: dict[str, Callable[[tf.Tensor], list[tf.Tensor]]] = {
    "nearest": lambda d: [tf.ones_like(d)],
    "bilinear": lambda d: [1.0 - d, d],
    # a = -1 as in Pillow's transform; its resize has -0.5
    "bicubic": lambda d: [d * (d * (2 - d) - 1), d * d * (d - 2) + 1, d * (d * (1 - d) + 1), d * d * (d - 1)],
}


# Policies. Magnitudes: 0 to 10 in RAND_AUGMENT, 0 to 30 in TRIVIAL_AUGMENT, 0 to 1 in THREE_AUGMENT.

_POINTWISE = (identity, invert, posterize, solarize, solarize_add, auto_contrast, equalize)
_BLENDS = (brightness, contrast, color, grayscale, sharpness, gaussian_blur)
OPS: dict[str, Callable[..., tf.Tensor]] = {op.__name__: op for op in (*_POINTWISE, *_BLENDS)}
_WARPS = (rotate, shear_x, shear_y, translate_x, translate_y, translate_x_rel, translate_y_rel)
WARPS: dict[str, Callable[..., tf.Tensor]] = {op.__name__: op for op in _WARPS}

RAND_AUGMENT: dict[str, Level] = {
    "auto_contrast": None,
    "equalize": None,
    "invert": None,
    "rotate": lambda m, sign: sign * m * 3.0,
    "posterize": lambda m, sign: 4.0 - tf.floor(m * 0.4),
    "solarize": lambda m, sign: 256.0 - tf.floor(m * 25.6),
    "solarize_add": lambda m, sign: tf.floor(m * 11.0),
    **dict.fromkeys(
        ("color", "contrast", "brightness", "sharpness"), lambda m, sign: tf.maximum(1.0 + sign * m * 0.09, 0.1)
    ),
    **dict.fromkeys(("shear_x", "shear_y"), lambda m, sign: sign * m * 0.03),
    **dict.fromkeys(("translate_x_rel", "translate_y_rel"), lambda m, sign: sign * m * 0.045),
}
RAND_AUGMENT_PLAIN: dict[str, Level] = {  # the same operations; of these, a larger magnitude need not change more
    **RAND_AUGMENT,
    "posterize": lambda m, sign: tf.floor(m * 0.4),
    "solarize": lambda m, sign: tf.floor(m * 25.6),
    **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), lambda m, sign: m * 0.18 + 0.1),
}
TRIVIAL_AUGMENT: dict[str, Level] = {
    "identity": None,
    **dict.fromkeys(("shear_x", "shear_y"), lambda m, sign: sign * m * 0.033),
    **dict.fromkeys(("translate_x", "translate_y"), lambda m, sign: sign * tf.floor(m * 32.0 / 30.0)),
    "rotate": lambda m, sign: sign * m * 4.5,
    **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), lambda m, sign: 1.0 + sign * m * 0.033),
    "posterize": lambda m, sign: 8.0 - tf.round(m * 0.2),
    "solarize": lambda m, sign: 255.0 - m * 8.5,
    "auto_contrast": None,
    "equalize": None,
}
THREE_AUGMENT: dict[str, Level] = {
    "grayscale": None,
    "solarize": lambda m, sign: 128,
    "gaussian_blur": lambda m, sign: 0.1 + 1.9 * m,
}

_SECTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {  # of timm's name: pattern -> argument and its value
    r"m(\d(?:\.\d+)?|10)": ("magnitude", float),
    r"mstd(\d+(?:\.\d+)?)": ("magnitude_std", lambda text: float(text) if float(text) <= 100 else math.inf),
    r"inc([01])": ("increasing", lambda text: text == "1"),
    r"n([1-9]\d?)": ("ops", int),
    r"p([01]|0?\.\d+)": ("probability", float),
}


def _apply(
    image: tf.Tensor,
    table: Mapping[str, Level],
    draws: Mapping[str, tf.Tensor],
    *,
    fill: Color = (0, 0, 0),
    interpolation: str = "nearest",
) -> tf.Tensor:
    """The operations draws["op"] of the table, one after the other; the number after the last one is none."""
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"data.interpolation={interpolation!r} is none of {', '.join(INTERPOLATIONS)}")
    shape = image.shape

    def branch(name: str, level: Level, image: tf.Tensor, m: tf.Tensor, sign: tf.Tensor) -> Callable[[], tf.Tensor]:
        if level is None:
            return lambda: OPS[name](image)
        if name in WARPS:
            return lambda: WARPS[name](image, level(m, sign), fill=fill, interpolation=interpolation)
        return lambda: OPS[name](image, level(m, sign))

    drawn = [draws["op"], tf.cast(draws["magnitude"], tf.float64), tf.cast(draws["sign"], tf.float64)]
    for op, m, sign in zip(*map(tf.unstack, drawn), strict=True):
        branches = [branch(name, level, image, m, sign) for name, level in table.items()]
        image = tf.switch_case(op, [*branches, branch("identity", None, image, m, sign)])
        image.set_shape(shape)
    return image


def _uniform(shape: list[int], seed: tf.Tensor) -> list[tf.Tensor]:
    return tf.unstack(tf.random.stateless_uniform(shape, fold_in(seed, 0), alg="philox"))


def _sign(uniform: tf.Tensor) -> tf.Tensor:
    return tf.where(uniform < 0.5, -1.0, 1.0)


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


def _slide(image: tf.Tensor, offset: tf.Tensor, axis: int, fill: Color, interpolation: str) -> tf.Tensor:
    """Take line i from offset[i] pixels further along the axis; offset [lines] or [1].

    All pixels of a line have the same weights, so one gather of the line, a little longer, serves every tap.
    """
    h, w = tf.unstack(tf.shape(image)[:2])
    lines, n = (h, w) if axis == 1 else (w, h)
    first, weights = _taps(offset[:, None], interpolation)
    along = tf.clip_by_value(first + tf.range(n + len(weights) - 1), 0, n - 1)  # [lines, n + taps - 1]
    index = tf.range(lines)[:, None] * w + along if axis == 1 else tf.range(lines)[:, None] + along * w
    pixels = tf.cast(tf.gather(tf.reshape(image, [-1, 3]), index), tf.float32)
    total = tf.add_n([weight * pixels[:, k : k + n] for k, weight in enumerate(weights)])
    places = _range(n) + offset[:, None]  # [lines, n]
    if axis == 0:
        total, places = tf.transpose(total, [1, 0, 2]), tf.transpose(places)
    return _fill_outside(total, _inside(places, n), fill)


def _taps(place: tf.Tensor, interpolation: str) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """The first pixel that counts at a place, int32 of its shape, and the weights from there on, each [..., 1]."""
    floor = tf.floor(place + 0.5 if interpolation == "nearest" else place)
    weights = INTERPOLATIONS[interpolation](tf.cast(place - floor, tf.float32))
    return tf.cast(floor, tf.int32) - (len(weights) - 1) // 2, [weight[..., None] for weight in weights]


def _inside(place: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    return (place >= -0.5) & (place < tf.cast(size, tf.float64) - 0.5)


def _fill_outside(values: tf.Tensor, inside: tf.Tensor, fill: Color) -> tf.Tensor:
    # Pillow cuts the fraction off; 1/1024 keeps float32's rounding from turning a flat 200 into 199.
    values = tf.cast(tf.clip_by_value(values + 1 / 1024, 0.0, 255.0), tf.uint8)
    # Outside, take the fill that stands after the last pixel: a gather is several times faster than tf.where here.
    shape = tf.shape(values)[:2]
    index = tf.where(inside, tf.reshape(tf.range(shape[0] * shape[1]), shape), shape[0] * shape[1])
    return tf.gather(tf.concat([tf.reshape(values, [-1, 3]), tf.constant([fill], tf.uint8)], 0), index)
