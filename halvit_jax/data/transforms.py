"""From a record to an example: decoding, cropping and augmenting the image; all other features pass through."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import tensorflow as tf

from halvit_jax.data import augment, file_formats, ops
from halvit_jax.data.sources.base import Record

Example = dict[str, tf.Tensor]
"""Named features of one row of a batch. `decoded` is False where grey replaces bytes that cannot be decoded; the loader
takes `decoded` and `name` out of the batch."""
Transform = Callable[[Record, tf.Tensor], Example]  # (record, seed [2]) -> example
Augmentation = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # (image, seed [2]) -> image

ON_BAD_IMAGE = ("error", "replace")
EVAL_RESIZES: dict[str, Callable[..., tf.Tensor]] = {"short_side": ops.central_crop, "squash": ops.squash}
GREY = 128
COLOURS: dict[int, Callable[[tf.Tensor], tf.Tensor]] = {1: ops.to_grey, 3: lambda image: image}


class DecodedImage(TypedDict):
    """`image`: uint8 [height, width, 3]; `decoded`: False where grey replaces bytes that cannot be decoded."""

    image: tf.Tensor
    decoded: tf.Tensor


def train_transform(
    size: tuple[int, int],
    *,
    crop: str,
    min_area: float,
    flip: bool,
    shift: int,
    policy: str,
    color_jitter: float,
    method: str,
    antialias: bool,
    exif_rotation: bool = False,
    channels: int = 3,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    on_bad_image: str = "error",
) -> Transform:
    """Crop to `size` (height, width), flip, shift, augmentation policy, colour jitter, in this order (timm's).

    The fields of `config.data` explain each. `mean` is that of the data, with which RandAugment fills what comes in
    from outside of the image.

    Raises:
        ValueError: a value that is not allowed, naming its field.
    """
    _check_method(method)

    def cropped(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        how = {"size": size, "method": method, "antialias": antialias, "rotate": exif_rotation}
        return ops.random_resized_crop(encoded, seed, min_area=min_area, **how)

    def whole(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        return ops.resize(decode_whole(encoded), size, method=method, antialias=antialias)

    decode_whole = ops.decode_rotated if exif_rotation else ops.decode

    crops = {"random_resized": cropped, "whole": whole}
    if crop not in crops:
        raise ValueError(f"data.crop={crop!r} is not one of {', '.join(crops)}")
    if not 0.0 < min_area <= 1.0:
        raise ValueError(f"data.min_crop_area={min_area} must lie in (0, 1]")
    for name, value in {"shift": shift, "color_jitter": color_jitter}.items():
        if value < 0:
            raise ValueError(f"data.{name}={value} must not be negative")
    augmentations: list[tuple[int, Augmentation]] = []  # the position in this list is folded into the seed
    if flip:
        augmentations.append((1, ops.random_flip))
    if shift:
        augmentations.append((2, lambda image, seed: ops.random_shift(image, seed, pixels=shift)))
    if policy:
        fill = tuple(min(255, round(255 * value)) for value in (mean if len(mean) == 3 else (*mean, *mean, *mean)))
        augmentations.append((3, augment.parse_policy(policy, interpolation=method, fill=fill)))
    if color_jitter:
        strengths = dict.fromkeys(("brightness", "contrast", "saturation"), color_jitter)
        augmentations.append((4, lambda image, seed: augment.color_jitter(image, seed, **strengths)))
    decode, colours = _decoder(crops[crop], size, on_bad_image, exif_rotation), _colours(channels)

    def transform(record: Record, seed: tf.Tensor) -> Example:
        example = {**record, **decode(record["image"], ops.fold_in(seed, 0))}
        for number, augmentation in augmentations:
            example["image"] = augmentation(example["image"], ops.fold_in(seed, number))
        return example | {"image": colours(example["image"])}

    return transform


def eval_transform(
    size: tuple[int, int],
    *,
    fraction: float,
    method: str,
    resize: str = "short_side",
    exif_rotation: bool = False,
    channels: int = 3,
    on_bad_image: str = "error",
) -> Transform:
    """Resize to cover `size` (height, width) / fraction, cut out the middle; the seed is not used.

    `resize`: a key of EVAL_RESIZES; "squash" resizes both sides to size / fraction.

    Raises:
        ValueError: a value that is not allowed, naming its field.
    """
    _check_method(method)
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"data.eval_crop={fraction} must lie in (0, 1]")
    if resize not in EVAL_RESIZES:
        raise ValueError(f"data.eval_resize={resize!r} is not one of {', '.join(EVAL_RESIZES)}")

    def middle(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        return EVAL_RESIZES[resize](decode_whole(encoded), size=size, fraction=fraction, method=method)

    decode_whole = ops.decode_rotated if exif_rotation else ops.decode
    decode, colours = _decoder(middle, size, on_bad_image, exif_rotation), _colours(channels)

    def transform(record: Record, seed: tf.Tensor) -> Example:
        decoded = decode(record["image"], seed)
        return {**record, **decoded, "image": colours(decoded["image"])}

    return transform


def read_image(path: str, transform: Transform) -> np.ndarray:
    """The image of a file, transformed: uint8 [height, width, c].

    Raises:
        ValueError: the file cannot be read, or is not such an image.
    """
    try:
        record = {"image": tf.io.read_file(path), "name": tf.constant(path)}
        return transform(record, tf.zeros(2, tf.int64))["image"].numpy()
    except tf.errors.OpError as error:
        raise ValueError(f"{path} is not an image that can be read: {ops.reason(error)}") from error


def transform_array(image: np.ndarray, transform: Transform) -> np.ndarray:
    """An image in memory, uint8 [h, w, 3] or grey [h, w], transformed as its file would be.

    Raises:
        ValueError: an array of another shape or type.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] not in (1, 3)):
        raise ValueError(f"an image must be uint8 [h, w, 3] or [h, w], not {image.dtype} {list(image.shape)}")
    png = tf.io.encode_png(image if image.ndim == 3 else image[..., None])
    return transform({"image": png, "name": tf.constant("")}, tf.zeros(2, tf.int64))["image"].numpy()


def write_png(path: str, image: np.ndarray) -> None:
    """Write an image, uint8 [h, w, 3].

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        tf.io.write_file(path, png(image))
    except tf.errors.OpError as error:
        raise ValueError(f"{path} cannot be written: {ops.reason(error)}") from error


def png(image: np.ndarray) -> bytes:
    """An image, uint8 [h, w, c], as the content of a PNG file."""
    return tf.io.encode_png(image).numpy()


def _decoder(
    crop: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], size: tuple[int, int], on_bad_image: str, rotate: bool
) -> Callable[[tf.Tensor, tf.Tensor], DecodedImage]:
    """(encoded image, seed) -> its crop; bytes that cannot be decoded raise an error or become grey."""
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"data.on_bad_image={on_bad_image!r} is not one of {', '.join(ON_BAD_IMAGE)}")
    grey = np.full((*size, 3), GREY, np.uint8)

    def decodable_crop(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return crop(file_formats.to_decodable(encoded, rotate=rotate), seed)

    def raise_on_error(encoded: tf.Tensor, seed: tf.Tensor) -> DecodedImage:
        return {"image": decodable_crop(encoded, seed), "decoded": tf.constant(True)}

    def replace_on_error(encoded: tf.Tensor, seed: tf.Tensor) -> DecodedImage:
        image, decoded = ops.try_or_default(decodable_crop, encoded, seed, default=grey)
        return {"image": image, "decoded": decoded}

    return raise_on_error if on_bad_image == "error" else replace_on_error


def _colours(channels: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """An image of three colours as one of so many channels."""
    if channels not in COLOURS:
        raise ValueError(
            f"model.in_channels={channels}: image files are read with 3 channels, or 1 (grey); images of others come "
            "from a loader of your own"
        )
    return COLOURS[channels]


def _check_method(method: str) -> None:
    if method not in ops.RESIZE_METHODS:
        raise ValueError(f"data.interpolation={method!r} is not one of {', '.join(ops.RESIZE_METHODS)}")
