"""Operations on one example: encoded image in, uint8 image out.

Every op that draws something takes a stateless seed (int64 [2]) and is a pure function of it. `h w` space.
"""

import tensorflow as tf

RESIZE_METHODS = ("bilinear", "bicubic")
CROP_ATTEMPTS = 10  # boxes tried before the central crop, as in torchvision


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """JPEG, PNG, GIF or BMP bytes -> uint8 [h, w, 3]; grey becomes three equal colours."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    return image


def random_resized_crop(
    encoded: tf.Tensor, seed: tf.Tensor, *, size: int, method: str, antialias: bool, min_area: float
) -> tf.Tensor:
    """A random box of `min_area` to 1 of the image at an aspect ratio of 3/4 to 4/3, resized to size x size.

    Of a JPEG only the blocks the box needs are decoded. The box is drawn as in torchvision: up to ten tries, the first
    that fits, else the largest central box with an allowed ratio.
    """
    is_jpeg = tf.io.is_jpeg(encoded)
    shape = tf.cond(
        is_jpeg, lambda: tf.io.extract_jpeg_shape(encoded), lambda: tf.shape(decode(encoded), out_type=tf.int32)
    )
    box = _random_box(shape[0], shape[1], seed, min_area)

    def crop_decoded() -> tf.Tensor:
        top, left, height, width = tf.unstack(box)
        return decode(encoded)[top : top + height, left : left + width]

    crop = tf.cond(is_jpeg, lambda: tf.io.decode_and_crop_jpeg(encoded, box, channels=3), crop_decoded)
    return resize(crop, (size, size), method=method, antialias=antialias)


def central_crop(image: tf.Tensor, *, size: int, share: float, method: str) -> tf.Tensor:
    """Resize the short side to size / share (rounded down, antialiased), then cut size x size out of the middle."""
    if image.shape[:2] == (size, size):
        return image
    short = int(size / share)
    height, width = tf.unstack(tf.shape(image)[:2])
    new_height = tf.where(height < width, short, short * height // width)
    new_width = tf.where(height < width, short * width // height, short)
    image = resize(image, (new_height, new_width), method=method, antialias=True)
    top, left = _round_half(new_height - size), _round_half(new_width - size)
    return tf.ensure_shape(image[top : top + size, left : left + size], (size, size, 3))


def resize(image: tf.Tensor, shape: tuple, *, method: str, antialias: bool) -> tf.Tensor:
    """Resize to (height, width), rounded to uint8. Bicubic with antialias is Pillow's kernel (a = -0.5)."""
    resized = tf.image.resize(image, shape, method=method, antialias=antialias)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirror left and right with probability 1/2."""
    return tf.image.stateless_random_flip_left_right(image, seed)


def random_shift(image: tf.Tensor, seed: tf.Tensor, *, pixels: int) -> tf.Tensor:
    """Move the image by up to `pixels` along each axis, black coming in at the border."""
    height, width = tf.unstack(tf.shape(image)[:2])
    padded = tf.pad(image, [[pixels, pixels], [pixels, pixels], [0, 0]])
    offset = tf.random.stateless_uniform((2,), seed, maxval=2 * pixels + 1, dtype=tf.int32)
    moved = tf.image.crop_to_bounding_box(padded, offset[0], offset[1], height, width)
    return tf.ensure_shape(moved, image.shape)


def fold_in(seed: tf.Tensor, data: int) -> tf.Tensor:
    """A seed of its own for use number `data` of this seed."""
    return tf.random.experimental.stateless_fold_in(seed, tf.constant(data, tf.int64))


def _random_box(height: tf.Tensor, width: tf.Tensor, seed: tf.Tensor, min_area: float) -> tf.Tensor:
    h, w = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    draws = tf.random.stateless_uniform((4, CROP_ATTEMPTS), seed)
    area = h * w * (min_area + (1.0 - min_area) * draws[0])
    ratio = tf.exp(tf.math.log(3 / 4) + (tf.math.log(4 / 3) - tf.math.log(3 / 4)) * draws[1])  # width / height
    widths, heights = tf.round(tf.sqrt(area * ratio)), tf.round(tf.sqrt(area / ratio))
    fits = (widths >= 1) & (heights >= 1) & (widths <= w) & (heights <= h)
    first = tf.argmax(fits)  # the first True
    own = tf.stack([draws[2, first] * (h - heights[first] + 1), draws[3, first] * (w - widths[first] + 1)])
    drawn = tf.concat([tf.floor(own), [heights[first], widths[first]]], 0)
    central_w, central_h = tf.minimum(w, tf.round(h * 4 / 3)), tf.minimum(h, tf.round(w * 4 / 3))
    central = tf.stack([tf.floor((h - central_h) / 2), tf.floor((w - central_w) / 2), central_h, central_w])
    return tf.cast(tf.where(fits[first], drawn, central), tf.int32)


def _round_half(difference: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.round(tf.cast(difference, tf.float32) / 2), tf.int32)
