"""Image files as they come: formats that only Pillow reads right, and the rotation noted in EXIF.

TensorFlow decodes JPEG, PNG, GIF and BMP, by their first bytes and whatever the file is called. Of a BMP with a palette
it takes the indices for grey. That kind, WebP and TIFF are handed to Pillow, which is not required: without it the
image is one that cannot be decoded.
"""

import io
import struct

import numpy as np
import tensorflow as tf

from halvit_jax.text import pip_install

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")  # of a GIF the first frame
PILLOW_SUFFIXES = (".webp", ".tif", ".tiff")
HEAD = 30  # bytes in which a format can be told
ORIENTATION = 0x0112  # EXIF's tag
# EXIF orientation - 1 -> (transpose first, then mirror top and bottom, then left and right)
ROTATIONS = np.array([(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1), (1, 1, 0)], bool)


def has_pillow() -> bool:
    """True if the formats of PILLOW_SUFFIXES can be read."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        return False
    return True


def to_decodable(encoded: tf.Tensor, *, rotate: bool = False) -> tf.Tensor:
    """The bytes of an image as TensorFlow decodes them right: what only Pillow does becomes a PNG.

    With `rotate`, that PNG is rotated as EXIF notes; a JPEG is left as it is, for `orientation`.

    Raises:
        tf.errors.OpError: Pillow is needed and missing, or cannot read the file.
    """

    def transcoded() -> tf.Tensor:
        png = tf.numpy_function(lambda data: _as_png(_bytes(data), rotate=rotate), [encoded], tf.string, stateful=False)
        return tf.ensure_shape(png, [])

    # Padded, because a file may have fewer bytes.
    head = tf.strings.substr(tf.strings.substr(encoded, 0, HEAD) + b"\0" * HEAD, 0, HEAD)

    def has(start: int, *words: bytes) -> tf.Tensor:
        found = tf.strings.substr(head, start, len(words[0]))
        return tf.reduce_any(found == tf.constant(words))

    bits = tf.io.decode_raw(tf.strings.substr(head, 28, 2), tf.uint16)[0]  # of a pixel, in a BMP
    foreign = (
        (has(0, b"RIFF") & has(8, b"WEBP")) | has(0, b"II*\0", b"MM\0*") | (has(0, b"BM") & (bits > 0) & (bits <= 8))
    )
    return tf.cond(foreign, transcoded, lambda: encoded)


def orientation(encoded: tf.Tensor) -> tf.Tensor:
    """The rotation that a JPEG notes in EXIF, as a row of ROTATIONS, bool [3]."""
    code = tf.numpy_function(
        lambda data: np.int64(_exif_orientation(_bytes(data))), [encoded], tf.int64, stateful=False
    )
    return tf.gather(ROTATIONS, tf.ensure_shape(code, []) - 1)


def rotate(image: tf.Tensor, rotation: tf.Tensor) -> tf.Tensor:
    """An image [h, w, c] as it is to be seen; `rotation` is a row of ROTATIONS."""
    image = tf.cond(rotation[0], lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    image = tf.cond(rotation[1], lambda: image[::-1], lambda: image)
    return tf.ensure_shape(tf.cond(rotation[2], lambda: image[:, ::-1], lambda: image), [None, None, 3])


def seen_shape(shape: tf.Tensor, rotation: tf.Tensor) -> tf.Tensor:
    """(height, width) of an image as it is to be seen, from those in the file."""
    return tf.where(rotation[0], shape[::-1], shape)


def box_in_file(box: tf.Tensor, seen: tf.Tensor, rotation: tf.Tensor) -> tf.Tensor:
    """The box (top, left, height, width) of the file that `rotate` turns into `box` of an image of the shape `seen`."""
    corner, extent = box[:2], box[2:]
    corner = tf.where(rotation[1:], seen - corner - extent, corner)
    swap = rotation[0]
    return tf.concat([tf.where(swap, corner[::-1], corner), tf.where(swap, extent[::-1], extent)], 0)


def _bytes(data: bytes | np.ndarray) -> bytes:
    """The argument of a function in Python: bytes in a pipeline, an array where TensorFlow runs eagerly."""
    return data if isinstance(data, bytes) else data.item()


def _as_png(data: bytes, *, rotate: bool) -> bytes:
    kind = {b"RI": "WebP", b"BM": "a BMP with a palette"}.get(data[:2], "TIFF")
    if not has_pillow():
        raise _unreadable(
            f"it is {kind} by its first bytes, which needs Pillow; convert it, or install that: {pip_install('pillow')}"
        )
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            seen = ImageOps.exif_transpose(image) if rotate else image
            png = io.BytesIO()
            seen.convert("RGB").save(png, "PNG", compress_level=1)
    except Exception as error:  # of any kind, because the file is broken
        raise _unreadable(f"it is {kind} by its first bytes, and Pillow cannot read it: {error}") from error
    return png.getvalue()


def _unreadable(message: str) -> tf.errors.InvalidArgumentError:
    return tf.errors.InvalidArgumentError(None, None, message)  # as TensorFlow's own decoders raise


def _exif_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 to 8; 1 where there is none."""
    try:
        place = 2
        while data[place] == 0xFF and data[place + 1] != 0xDA:  # up to the pixels
            length = int.from_bytes(data[place + 2 : place + 4], "big")
            if data[place + 1] == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
                return _in_tiff(data[place + 10 : place + 2 + length])
            place += 2 + length
    except (IndexError, struct.error):  # a broken file, which decoding answers
        pass
    return 1


def _in_tiff(tiff: bytes) -> int:
    order = "<" if tiff[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    for number in range(count):
        tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * number)
        if tag == ORIENTATION and 1 <= value <= 8:
            return value
    return 1
