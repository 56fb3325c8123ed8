"""Random augmentation of one training image: RandAugment, TrivialAugment, 3-Augment and colour jitter.

Everything is a pure function of (image, seed), the same eagerly and inside `tf.data.Dataset.map`. An image is a uint8
tensor [h, w, 3], a seed an integer tensor [2]; every draw is stateless, so one seed gives one result on any host.

Each operation computes what Pillow computes, to the rounding, because the recipes we reproduce were tuned on Pillow.
A policy is a table: name of the operation -> its level, as a function of the drawn magnitude and sign (None: the
operation has no level). Only the operation drawn is run.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from halvit_jax.data.ops import fold_in
from halvit_jax.data.pillow_ops import INTERPOLATIONS, OPS, WARPS, Color

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
    `increasing`: a larger magnitude always changes the image more. `fill` is the colour of pixels from outside.
    """
    table = RAND_AUGMENT if increasing else RAND_AUGMENT_PLAIN
    draws = draw_rand_augment(seed, ops=ops, magnitude=magnitude, magnitude_std=magnitude_std, probability=probability)
    return _apply(image, table, draws, fill=fill, interpolation=interpolation)


def draw_rand_augment(
    seed: tf.Tensor, *, ops: int, magnitude: float, magnitude_std: float, probability: float
) -> dict[str, tf.Tensor]:
    """The draws of `rand_augment`, each [ops]: `op` (index in RAND_AUGMENT; its length: none), `magnitude`, `sign`."""
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


def parse_policy(text: str, *, interpolation: str, fill: Color) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """The policy of `config.data.augment` as a function (image, seed) -> image.

    "trivial", "three", or RandAugment in timm's notation, such as "rand-m9-mstd0.5-inc1". `fill` is RandAugment's, as
    in timm the mean of the data; TrivialAugment fills with black, as in torchvision.
    """
    if text == "trivial":
        return trivial_augment
    if text == "three":
        return three_augment
    return functools.partial(rand_augment, interpolation=interpolation, fill=fill, **parse_rand_augment(text))


def parse_rand_augment(text: str) -> dict[str, Any]:
    """Read timm's name of a RandAugment, such as "rand-m9-mstd0.5-inc1", as keyword arguments of `rand_augment`.

    Sections, in any order: m magnitude (10 if not given), mstd its deviation (0; above 100: uniform magnitudes), inc
    increasing (not if not given; inc0 too is increasing, because timm reads it as `bool("0")`), n operations (2), p
    probability (0.5).
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
            f"data.augment={text!r} is not understood; give 'trivial', 'three', or 'rand' and, each at most once, "
            "joined by '-': m0 to m10, mstd<number>, inc0 or inc1, n1 to n99, p0 to p1; for example "
            "'rand-m9-mstd0.5-inc1'"
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
    """The draws of `trivial_augment`, each [1]: `op` (index in TRIVIAL_AUGMENT), `magnitude` (0, 1, ... 30), `sign`."""
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


# Policies. Magnitudes: 0 to 10 in RAND_AUGMENT, 0 to 30 in TRIVIAL_AUGMENT, 0 to 1 in THREE_AUGMENT.

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
    **dict.fromkeys(("translate_x", "translate_y"), lambda m, sign: sign * tf.floor(m * (32 / 30))),
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
    r"inc([01])": ("increasing", lambda text: True),
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
    """The operations draws["op"] of the table, one after the other; the index after the last one means no operation."""
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"data.interpolation={interpolation!r} is not one of {', '.join(INTERPOLATIONS)}")
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
