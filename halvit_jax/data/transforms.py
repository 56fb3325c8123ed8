"""What happens to one image, from encoded bytes to the uint8 square a model is trained or evaluated on."""

from collections.abc import Callable
from typing import TypedDict

import numpy as np
import tensorflow as tf

from halvit_jax.data import augment, ops


class Picture(TypedDict):
    """`image`: uint8 [size, size, 3]; `good`: False where the bytes could not be decoded and grey was taken instead."""

    image: tf.Tensor
    good: tf.Tensor


Transform = Callable[[tf.Tensor, tf.Tensor], Picture]  # (encoded image, seed [2]) -> picture
Change = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # (image, seed [2]) -> image

ON_BAD_IMAGE = ("error", "replace")
GREY = 128


def train_transform(
    size: int,
    *,
    crop: str,
    min_area: float,
    flip: bool,
    shift: int,
    policy: str,
    color_jitter: float,
    method: str,
    antialias: bool,
    on_bad_image: str = "error",
) -> Transform:
    """Crop, flip, shift, colour jitter, augmentation policy, in this order; the fields of `config.data` say more.

    Raises:
        ValueError: a value that is not allowed, naming its field.
    """
    _check_method(method)

    def cropped(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return ops.random_resized_crop(encoded, seed, size=size, method=method, antialias=antialias, min_area=min_area)

    def whole(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        return ops.resize(ops.decode(encoded), (size, size), method=method, antialias=antialias)

    crops = {"random_resized": cropped, "whole": whole}
    if crop not in crops:
        raise ValueError(f"data.crop={crop!r} is not one of {', '.join(crops)}")
    if not 0.0 < min_area <= 1.0:
        raise ValueError(f"data.min_crop_area={min_area} must lie in (0, 1]")
    for name, value in {"shift": shift, "color_jitter": color_jitter}.items():
        if value < 0:
            raise ValueError(f"data.{name}={value} must not be negative")
    changes: list[tuple[int, Change]] = []  # the number is what the seed is folded with
    if flip:
        changes.append((1, ops.random_flip))
    if shift:
        changes.append((2, lambda image, seed: ops.random_shift(image, seed, pixels=shift)))
    if color_jitter:
        strengths = dict.fromkeys(("brightness", "contrast", "saturation"), color_jitter)
        changes.append((4, lambda image, seed: augment.color_jitter(image, seed, **strengths)))
    if policy:
        changes.append((3, augment.parse_policy(policy, interpolation=method)))
    take = _square(crops[crop], size, on_bad_image)

    def transform(encoded: tf.Tensor, seed: tf.Tensor) -> Picture:
        picture = take(encoded, ops.fold_in(seed, 0))
        image = picture["image"]
        for number, change in changes:
            image = change(image, ops.fold_in(seed, number))
        return {"image": image, "good": picture["good"]}

    return transform


def eval_transform(size: int, *, share: float, method: str, on_bad_image: str = "error") -> Transform:
    """Resize the short side, cut out the middle; the seed is not used.

    Raises:
        ValueError: a value that is not allowed, naming its field.
    """
    _check_method(method)
    if not 0.0 < share <= 1.0:
        raise ValueError(f"data.eval_crop={share} must lie in (0, 1]")

    def middle(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        return ops.central_crop(ops.decode(encoded), size=size, share=share, method=method)

    return _square(middle, size, on_bad_image)


def read_image(path: str, transform: Transform) -> np.ndarray:
    """The image of a file (JPEG, PNG, GIF, BMP), transformed: uint8 [size, size, 3].

    Raises:
        ValueError: the file cannot be read, or is no such image.
    """
    try:
        return transform(tf.io.read_file(path), tf.zeros(2, tf.int64))["image"].numpy()
    except tf.errors.OpError as error:
        raise ValueError(f"{path} is no image that can be read: {ops.reason(error)}") from error


def write_png(path: str, image: np.ndarray) -> None:
    """Write an image, uint8 [h, w, 3].

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        tf.io.write_file(path, tf.io.encode_png(image))
    except tf.errors.OpError as error:
        raise ValueError(f"{path} cannot be written: {ops.reason(error)}") from error


def _square(take: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], size: int, on_bad_image: str) -> Transform:
    """What makes a square of the encoded image, as a transform that fails or gives grey where it cannot."""
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"data.on_bad_image={on_bad_image!r} is not one of {', '.join(ON_BAD_IMAGE)}")
    grey = np.full((size, size, 3), GREY, np.uint8)

    def strict(encoded: tf.Tensor, seed: tf.Tensor) -> Picture:
        return {"image": take(encoded, seed), "good": tf.constant(True)}

    def forgiving(encoded: tf.Tensor, seed: tf.Tensor) -> Picture:
        image, good = ops.attempt(take, encoded, seed, instead=grey)
        return {"image": image, "good": good}

    return strict if on_bad_image == "error" else forgiving


def _check_method(method: str) -> None:
    if method not in ops.RESIZE_METHODS:
        raise ValueError(f"data.interpolation={method!r} is not one of {', '.join(ops.RESIZE_METHODS)}")
