"""Formats of image files, and the rotation in EXIF: every pixel against Pillow."""

import io
import sys
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from halvit_jax.data import file_formats, ops
from halvit_jax.data.transforms import eval_transform, train_transform

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)).resize((40, 24))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def rotated(code: int) -> bytes:
    """A JPEG with this EXIF orientation."""
    exif = Image.Exif()
    exif[file_formats.ORIENTATION] = code
    exif[0x010F] = "a camera"
    return encoded(PHOTO, "JPEG", quality=95, exif=exif)


FOREIGN = {
    "WebP": encoded(PHOTO, "WEBP", lossless=True),
    "TIFF": encoded(PHOTO, "TIFF"),
    "a BMP with a palette": encoded(PHOTO.convert("P", palette=Image.Palette.ADAPTIVE), "BMP"),
}
KNOWN = {kind: encoded(PHOTO, kind) for kind in ("JPEG", "PNG", "BMP")}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_only_pillow_reads_right_has_its_pixels(kind: str) -> None:
    found = ops.decode(file_formats.to_decodable(tf.constant(FOREIGN[kind]))).numpy()
    np.testing.assert_array_equal(found, Image.open(io.BytesIO(FOREIGN[kind])).convert("RGB"))


@pytest.mark.parametrize("data", [*KNOWN.values(), b"", b"BM", b"<html>"])
def test_other_bytes_are_left_alone(data: bytes) -> None:
    assert file_formats.to_decodable(tf.constant(data)).numpy() == data


@pytest.mark.parametrize("kind", FOREIGN)
def test_without_pillow_the_format_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(tf.errors.OpError) as error:
        file_formats.to_decodable(tf.constant(FOREIGN[kind]))
    wanted = f"it is {kind} by its first bytes, which needs Pillow; convert it, or install that: pip install pillow"
    assert ops.reason(error.value) == wanted


def test_a_broken_file_of_such_a_format_is_an_error_or_grey() -> None:
    record = {"image": tf.constant(FOREIGN["WebP"][:40]), "name": tf.constant("a.jpg")}
    how = {"fraction": 1.0, "method": "bilinear"}
    with pytest.raises(tf.errors.OpError, match="it is WebP by its first bytes, and Pillow cannot read it"):
        eval_transform((8, 8), **how)(record, tf.zeros(2, tf.int64))
    assert not eval_transform((8, 8), **how, on_bad_image="replace")(record, tf.zeros(2, tf.int64))["decoded"]


@pytest.mark.parametrize("code", range(1, 9))
def test_a_rotation_noted_in_exif_is_applied_as_pillow_does(code: int) -> None:
    data = rotated(code)
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(ops.decode_rotated(tf.constant(data)), wanted)
    rotation = file_formats.orientation(tf.constant(data))
    seen = file_formats.seen_shape(ops.image_shape(tf.constant(data)), rotation)
    assert tuple(seen) == wanted.shape[:2]
    box = tf.constant([3, 5, 12, 9])
    crop = ops.decode_box(tf.constant(data), file_formats.box_in_file(box, seen, rotation))
    np.testing.assert_array_equal(file_formats.rotate(crop, rotation), wanted[3:15, 5:14])


def test_transforms_rotate_where_they_are_told_to() -> None:
    """Crops too: the same box of the rotated image."""
    record = {"image": tf.constant(rotated(6)), "name": tf.constant("a")}
    with Image.open(io.BytesIO(rotated(6))) as image:
        upright = encoded(ImageOps.exif_transpose(image), "PNG")
    fields = {"crop": "random_resized", "min_area": 0.3, "flip": False, "shift": 0, "policy": "", "color_jitter": 0.0}
    fields |= {"method": "bilinear", "antialias": False}
    seed = tf.constant([1, 2], tf.int64)
    found = [
        train_transform((8, 8), **fields, exif_rotation=rotation)({**record, "image": tf.constant(data)}, seed)["image"]
        for rotation, data in ((True, record["image"].numpy()), (False, upright))
    ]
    np.testing.assert_array_equal(*found)
    evaluated = [
        eval_transform((8, 8), fraction=1.0, method="bilinear", exif_rotation=rotation)(
            {**record, "image": tf.constant(data)}, seed
        )["image"]
        for rotation, data in ((True, record["image"].numpy()), (False, upright))
    ]
    np.testing.assert_array_equal(*evaluated)


@pytest.mark.parametrize("data", [KNOWN["PNG"], rotated(6)[:30], b"", b"\xff\xd8", rotated(6)[:45]])
def test_without_a_note_nothing_is_rotated(data: bytes) -> None:
    np.testing.assert_array_equal(file_formats.orientation(tf.constant(data)), [False, False, False])
