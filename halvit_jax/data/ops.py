"""Operations on one example: encoded image in, uint8 image out.

Every op that draws something takes a stateless seed (int64 [2]) and is a pure function of it. `h w` space.
"""

import re
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from halvit_jax.data import file_formats

RESIZE_METHODS = ("bilinear", "bicubic")
CROP_ATTEMPTS = 10  # boxes tried before the central crop, as in torchvision
MAX_PIXELS = 2**27  # of an image; a file of some kilobytes can claim more than there is memory
MAX_RATIO = 8  # of the sides: a longer image resized by its short side could be larger than there is memory
DCT = "INTEGER_ACCURATE"  # the same pixels as Pillow; TensorFlow's default is up to 18 grey levels away
PNG, GIF, BMP = b"\x89PNG", b"GIF8", b"BM"
HEAD = 26  # header with the size, in these three formats


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """JPEG, PNG, GIF or BMP bytes -> uint8 [h, w, 3]; grey and CMYK become three colours.

    A JPEG has the pixels of Pillow. A rotation noted in EXIF is not applied; see `decode_rotated`.

    Raises:
        tf.errors.InvalidArgumentError: the bytes are not such an image, are truncated, or claim too many pixels.
    """
    with tf.control_dependencies([image_shape(encoded)]):
        image = tf.cond(
            tf.io.is_jpeg(encoded),
            lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method=DCT),
            lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
        )
    return tf.ensure_shape(image, [None, None, 3])


def decode_rotated(encoded: tf.Tensor) -> tf.Tensor:
    """`decode`, rotated as a JPEG notes in EXIF."""
    return file_formats.rotate(decode(encoded), file_formats.orientation(encoded))


def random_resized_crop(
    encoded: tf.Tensor,
    seed: tf.Tensor,
    *,
    size: tuple[int, int],
    method: str,
    antialias: bool,
    min_area: float,
    rotate: bool = False,
) -> tf.Tensor:
    """A random box of `min_area` to 1 of the image at an aspect ratio of 3/4 to 4/3, resized to (height, width).

    With `rotate`, of the image as a JPEG notes its rotation in EXIF. Of a JPEG only the blocks the box needs are
    decoded. The box is drawn as in torchvision: up to ten tries, the first that fits, else the largest central box with
    an allowed ratio.

    Raises:
        tf.errors.InvalidArgumentError: as in `decode`, but bytes that a JPEG lacks below the box are not noticed.
    """
    shape = image_shape(encoded)
    if rotate:
        rotation = file_formats.orientation(encoded)
        seen = file_formats.seen_shape(shape, rotation)
        box = file_formats.box_in_file(random_box(seen[0], seen[1], seed, min_area), seen, rotation)
        crop = file_formats.rotate(decode_box(encoded, box), rotation)
    else:
        crop = decode_box(encoded, random_box(shape[0], shape[1], seed, min_area))
    return resize(crop, size, method=method, antialias=antialias)


def decode_box(encoded: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """Decode a box (top, left, height, width) of an image; of a JPEG only the blocks that the box needs.

    The pixels are those of the whole image. The colours of a JPEG's last column depend on the next one, so two more
    are decoded where the image has them.
    """

    def decode_blocks() -> tf.Tensor:
        right = tf.minimum(box[1] + box[3] + 2, tf.io.extract_jpeg_shape(encoded)[1])
        wider = tf.stack([box[0], box[1], box[2], right - box[1]])
        return tf.io.decode_and_crop_jpeg(encoded, wider, channels=3, dct_method=DCT)[:, : box[3]]

    def cut() -> tf.Tensor:
        image = decode(encoded)
        top, left = tf.unstack(tf.minimum(box[:2], tf.shape(image)[:2] - 1))  # a GIF may be smaller than its header
        return image[top : top + box[2], left : left + box[3]]

    crop = tf.cond(tf.io.is_jpeg(encoded), decode_blocks, cut)
    return tf.ensure_shape(crop, [None, None, 3])


def random_box(height: tf.Tensor, width: tf.Tensor, seed: tf.Tensor, min_area: float) -> tf.Tensor:
    """The box of `random_resized_crop`: top, left, height and width, int32 [4]."""
    limits = tf.cast(tf.stack([height, width]), tf.float32)
    draws = tf.random.stateless_uniform((4, CROP_ATTEMPTS), seed)
    area = tf.reduce_prod(limits) * (min_area + (1.0 - min_area) * draws[0])
    # The square root of the aspect ratio width / height in [3/4, 4/3]; for the height its inverse.
    stretch = tf.exp(np.log(4 / 3) * (draws[1] - 0.5) * np.array([[-1], [1]], np.float32))
    sides = tf.round(tf.sqrt(area) * stretch)  # [2, CROP_ATTEMPTS]: heights and widths
    fits = tf.reduce_all((sides >= 1) & (sides <= limits[:, None]), 0)
    first = tf.argmax(fits)  # the first True
    extent = sides[:, first]
    drawn = tf.concat([tf.floor(draws[2:, first] * (limits - extent + 1)), extent], 0)

    def central() -> tf.Tensor:
        extent = tf.minimum(limits, tf.round(limits[::-1] * np.float32(4 / 3)))
        return tf.concat([tf.floor((limits - extent) / 2), extent], 0)

    return tf.cast(tf.cond(fits[first], lambda: drawn, central), tf.int32)


def try_or_default(
    function: Callable[..., tf.Tensor], *arguments: tf.Tensor, default: np.ndarray
) -> tuple[tf.Tensor, tf.Tensor]:
    """(function(*arguments), True), or (`default`, False) where it fails.

    The function is mapped over a data set of one element, which is dropped where it fails and then replaced. In Python,
    which tf.data can run as well, it would take several times as long, and a process that exits while images are read
    ahead would hang.
    """

    def succeed(*arguments: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.ensure_shape(function(*arguments), default.shape), tf.constant(True)

    one = tf.data.Dataset.from_tensors(arguments).map(no_autograph(succeed))
    other = tf.data.Dataset.from_tensors((tf.constant(default), tf.constant(False)))
    return one.ignore_errors(log_warning=False).concatenate(other).take(1).get_single_element()


def central_crop(image: tf.Tensor, *, size: tuple[int, int], fraction: float, method: str) -> tf.Tensor:
    """Resize to just cover size / fraction (rounded down, antialiased), then cut `size` (height, width) out of it.

    Of an image longer than MAX_RATIO times its width only the middle is resized.
    """
    least_height, least_width = (int(side / fraction) for side in size)
    height, width = tf.unstack(tf.shape(image)[:2])
    longest = MAX_RATIO * tf.minimum(height, width)
    top, left = tf.maximum(height - longest, 0) // 2, tf.maximum(width - longest, 0) // 2
    image = image[top : top + longest, left : left + longest]
    height, width = tf.unstack(tf.shape(image)[:2])
    wide = height * least_width < width * least_height  # wider than the target
    new_height = tf.where(wide, least_height, least_width * height // width)
    new_width = tf.where(wide, least_height * width // height, least_width)
    image = resize(image, (new_height, new_width), method=method, antialias=True)
    top, left = _round_half(new_height - size[0]), _round_half(new_width - size[1])
    return tf.ensure_shape(image[top : top + size[0], left : left + size[1]], (*size, 3))


def squash(image: tf.Tensor, *, size: tuple[int, int], fraction: float, method: str) -> tf.Tensor:
    """Resize to size / fraction (rounded down, antialiased), ignoring the aspect ratio, then cut `size` out of it."""
    height, width = (int(side / fraction) for side in size)
    image = resize(image, (height, width), method=method, antialias=True)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return tf.ensure_shape(image[top : top + size[0], left : left + size[1]], (*size, 3))


def resize(image: tf.Tensor, shape: tuple, *, method: str, antialias: bool) -> tf.Tensor:
    """Resize to (height, width), rounded to uint8. Bicubic with antialias is Pillow's kernel (a = -0.5)."""
    resized = tf.image.resize(image, shape, method=method, antialias=antialias)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)


def to_grey(image: tf.Tensor) -> tf.Tensor:
    """The brightness of an image uint8 [h, w, 3], as Pillow's "L" (ITU-R 601): uint8 [h, w, 1]."""
    weighted = tf.cast(image, tf.int32) * tf.constant([19595, 38470, 7471])
    return tf.cast((tf.reduce_sum(weighted, -1, keepdims=True) + 0x8000) // 2**16, tf.uint8)


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirror left and right with probability 1/2."""
    return tf.image.stateless_random_flip_left_right(image, seed)


def random_shift(image: tf.Tensor, seed: tf.Tensor, *, pixels: int) -> tf.Tensor:
    """Translate by up to `pixels` along each axis, filling with black."""
    height, width = tf.unstack(tf.shape(image)[:2])
    padded = tf.pad(image, [[pixels, pixels], [pixels, pixels], [0, 0]])
    offset = tf.random.stateless_uniform((2,), seed, maxval=2 * pixels + 1, dtype=tf.int32)
    moved = tf.image.crop_to_bounding_box(padded, offset[0], offset[1], height, width)
    return tf.ensure_shape(moved, image.shape)


def no_autograph(function: Callable) -> Callable:
    """The function without AutoGraph, which our functions do not need and which takes seconds at every start."""
    return tf.autograph.experimental.do_not_convert(function)


def fold_in(seed: tf.Tensor, data: tf.Tensor | int) -> tf.Tensor:
    """An independent seed derived from this one and the number `data`."""
    return tf.random.experimental.stateless_fold_in(seed, tf.cast(data, tf.int64))


def image_shape(encoded: tf.Tensor) -> tf.Tensor:
    """(height, width) of an image from the first bytes of its file, int32 [2].

    Raises:
        tf.errors.InvalidArgumentError: no JPEG, PNG, GIF or BMP by its first bytes, or one of more than MAX_PIXELS.
    """
    shape = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.cast(tf.io.extract_jpeg_shape(encoded)[:2], tf.int64),
        lambda: _shape_of_others(encoded),
    )
    fits = (tf.reduce_min(shape) > 0) & (shape[0] <= MAX_PIXELS // tf.maximum(shape[1], 1))
    message = ["an image of", shape[0], "x", shape[1], "pixels, which must be 1 to", MAX_PIXELS]
    with tf.control_dependencies([tf.debugging.Assert(fits, message)]):
        return tf.ensure_shape(tf.cast(shape, tf.int32), [2])


def _shape_of_others(encoded: tf.Tensor) -> tf.Tensor:
    # Padded, because TensorFlow quotes the bytes where there are too few, and Python cannot decode its message.
    head = tf.strings.substr(tf.strings.substr(encoded, 0, HEAD) + b"\0" * HEAD, 0, HEAD)

    def numbers(start: int, width: type, little: bool) -> Callable[[], tf.Tensor]:
        size = 2 * np.dtype(width).itemsize
        return lambda: tf.cast(
            tf.io.decode_raw(tf.strings.substr(head, start, size), width, little_endian=little), tf.int64
        )

    def first(kind: bytes) -> tf.Tensor:
        return tf.strings.substr(head, 0, len(kind)) == kind

    def unknown() -> tf.Tensor:
        message = ["by its first bytes it is no JPEG, PNG, GIF or BMP; it has", tf.strings.length(encoded), "bytes"]
        with tf.control_dependencies([tf.debugging.Assert(False, message)]):
            return tf.zeros(2, tf.int64)

    return tf.case(  # PNG has its width first, and so have GIF and BMP
        [
            (first(PNG), lambda: numbers(16, np.int32, False)()[::-1]),
            (first(GIF), lambda: numbers(6, np.uint16, True)()[::-1]),
            (first(BMP), lambda: tf.abs(numbers(18, np.int32, True)()[::-1])),
        ],
        default=unknown,
    )


def reason(error: Exception) -> str:
    """The message of an error as one line, without the node names that TensorFlow adds."""
    message = str(getattr(error, "message", error))
    checked = re.match(r"Expected '.*' to be true\. Summarized data: (.*)", message, re.DOTALL)  # what failed eagerly
    if checked:
        return " ".join(line.removeprefix("b'").removesuffix("'") for line in checked[1].splitlines())
    place = r"\{\{.*?\}\} ?|Error in user-defined function passed to .*? with iterator: \S+: | ?\[(?:Op:|\[).*"
    line = re.sub(place, "", message.splitlines()[0]).strip()
    line = re.sub(r"^[\w.]*Error: ", "", line)  # raised in Python
    checked = re.match(r"assertion failed: (.*)", line)  # the same in a pipeline
    return re.sub(r"\[(.*?)\]", r"\1", checked[1]) if checked else line


def _round_half(difference: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.round(tf.cast(difference, tf.float32) / 2), tf.int32)
