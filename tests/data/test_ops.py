import io
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from helpers.tiers import tiered
from PIL import Image
from sklearn.datasets import load_sample_image

from halvit_jax.data import ops

PHOTOS = {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}  # [427, 640, 3]
PHOTO = PHOTOS["china"]


def _seed(number: int) -> tf.Tensor:
    return tf.constant([5, number], tf.int64)


def _crop(encoded: tf.Tensor, number: int, *, size: int = 32) -> np.ndarray:
    return ops.random_resized_crop(
        encoded, _seed(number), size=(size, size), method="bilinear", antialias=True, min_area=0.08
    ).numpy()


def _file(kind: str, image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("fraction", [0.875, 0.95])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", PHOTOS)
def test_central_crop_equals_pillow(name: str, method: str, fraction: float, turned: bool) -> None:
    photo = PHOTOS[name].transpose(1, 0, 2) if turned else PHOTOS[name]
    ours = ops.central_crop(tf.constant(photo), size=(224, 224), fraction=fraction, method=method).numpy().astype(int)
    kernel = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[method]
    short = int(224 / fraction)
    long = short * 640 // 427
    resized = Image.fromarray(photo).resize((short, long) if turned else (long, short), kernel)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    theirs = np.asarray(resized.crop((left, top, left + 224, top + 224))).astype(int)
    assert np.abs(ours - theirs).mean() <= 1.0


@pytest.mark.parametrize("fraction", [1.0, 0.875])
@pytest.mark.parametrize("name", PHOTOS)
def test_squash_equals_pillows_resize_of_the_whole_image(name: str, fraction: float) -> None:
    ours = ops.squash(tf.constant(PHOTOS[name]), size=(384, 384), fraction=fraction, method="bicubic").numpy()
    side = int(384 / fraction)
    resized = Image.fromarray(PHOTOS[name]).resize((side, side), Image.Resampling.BICUBIC)
    start = round((side - 384) / 2)
    theirs = np.asarray(resized.crop((start, start, start + 384, start + 384))).astype(int)
    assert np.abs(ours - theirs).mean() <= 1.0


def test_central_crop_leaves_an_image_of_the_right_size() -> None:
    image = tf.constant(PHOTO[:64, :64])
    np.testing.assert_array_equal(ops.central_crop(image, size=(64, 64), fraction=1.0, method="bicubic"), image)


@pytest.mark.parametrize("turned", [False, True])
def test_central_crop_to_a_rectangle_is_part_of_the_image_that_just_covers_it(turned: bool) -> None:
    photo, size = PHOTO, (96, 256)
    if turned:
        photo, size = photo.transpose(1, 0, 2), size[::-1]
    found = ops.central_crop(tf.constant(photo), size=size, fraction=1.0, method="bicubic").numpy()
    assert found.shape == (*size, 3)
    width, height = (170, 256) if turned else (256, 170)
    resized = Image.fromarray(photo).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (37, 0) if turned else (0, 37)
    theirs = np.asarray(resized.crop((left, top, left + size[1], top + size[0]))).astype(int)
    assert np.abs(found - theirs).mean() <= 1.0


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_central_crop_resizes_only_the_middle_of_a_very_long_image(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of 2**27 pixels may come as a small file; resized by its height it would fill 400 GB."""
    line = np.zeros((2, 3_000, 3), np.uint8)
    line[:, 1_500:] = 255
    expected = ops.central_crop(tf.constant(line[:, 1_400:1_600]), size=(32, 32), fraction=0.875, method=method)
    resized, resize = [], ops.resize
    monkeypatch.setattr(
        ops,
        "resize",
        lambda image, shape, **how: (resized.append(tuple(map(int, shape))), resize(image, shape, **how))[1],
    )
    for image in (line, line.transpose(1, 0, 2)):
        found = ops.central_crop(tf.constant(image), size=(32, 32), fraction=0.875, method=method)
        upright = found if image is line else tf.transpose(found, (1, 0, 2))
        np.testing.assert_array_equal(upright, expected)
    assert resized == [(36, 8 * 36), (8 * 36, 36)]


SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


def _jpeg(photo: np.ndarray, colours: str, progressive: bool, quality: int) -> bytes:
    image, file = Image.fromarray(photo), io.BytesIO()
    if colours == "grey":
        image.convert("L").save(file, "JPEG", progressive=progressive, quality=quality)
    else:
        image.save(file, "JPEG", progressive=progressive, quality=quality, subsampling=SUBSAMPLINGS[colours])
    return file.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("colours", [*SUBSAMPLINGS, "grey"])
@pytest.mark.parametrize("name", PHOTOS)
def test_a_jpeg_has_the_pixels_of_pillow(name: str, colours: str, progressive: bool) -> None:
    """The whole image and boxes of it, also where its sides are no multiples of a block's."""
    rng = np.random.default_rng(0)
    for photo, quality in ((PHOTOS[name], 95), (PHOTOS[name][:-2, :-3], 75)):
        jpeg = _jpeg(photo, colours, progressive, quality)
        expected = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        np.testing.assert_array_equal(ops.decode(tf.constant(jpeg)), expected)
        for _ in range(8):
            sides = [int(rng.integers(8, side)) for side in photo.shape[:2]]
            top, left = (
                int(rng.integers(0, side - length + 1)) for side, length in zip(photo.shape, sides, strict=False)
            )
            box = ops.decode_box(tf.constant(jpeg), tf.constant([top, left, *sides]))
            np.testing.assert_array_equal(box, expected[top : top + sides[0], left : left + sides[1]])


def test_crop_of_undecoded_jpeg_equals_crop_of_decoded() -> None:
    jpeg = tf.io.encode_jpeg(PHOTO, quality=95)
    png = tf.io.encode_png(ops.decode(jpeg))
    for number in range(5):
        np.testing.assert_array_equal(_crop(jpeg, number), _crop(png, number))


def test_random_boxes_cover_areas_and_ratios_as_asked() -> None:
    boxes = tf.data.Dataset.range(500).map(lambda n: ops.random_box(400, 600, tf.stack([5, n]), 0.08))
    top, left, height, width = np.array(list(boxes.as_numpy_iterator())).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 400).all()
    assert (left + width <= 600).all()
    area, ratio = height * width / (400 * 600), width / height
    assert area.min() > 0.07
    assert area.max() <= 1.0
    assert 0.35 < area.mean() < 0.55
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    assert abs(np.log(ratio).mean()) < 0.03


def test_a_shape_that_no_random_box_fits_gets_the_central_one() -> None:
    box = ops.random_box(1000, 10, _seed(0), 0.9).numpy()
    np.testing.assert_array_equal(box, [493, 0, 13, 10])


def test_flip_mirrors_half_of_the_images() -> None:
    image = tf.constant(PHOTO[:8, :8])
    flipped = [bool((ops.random_flip(image, _seed(n)).numpy() == PHOTO[:8, :8][:, ::-1]).all()) for n in range(200)]
    assert 70 < sum(flipped) < 130


def test_shift_moves_by_whole_pixels_and_fills_with_black() -> None:
    image = np.arange(1, 17, dtype=np.uint8).reshape(4, 4, 1).repeat(3, -1)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    expected = {padded[y : y + 4, x : x + 4].tobytes() for y in range(3) for x in range(3)}
    found = {ops.random_shift(tf.constant(image), _seed(n), pixels=1).numpy().tobytes() for n in range(100)}
    assert found == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_every_image_format_has_a_shape_and_is_decoded(kind: str) -> None:
    encoded = tf.constant(_file(kind, Image.fromarray(PHOTO[:30, :50])))
    assert ops.image_shape(encoded).numpy().tolist() == [30, 50]
    whole = ops.decode(encoded).numpy()
    assert np.abs(whole.astype(int) - PHOTO[:30, :50]).mean() < 20  # GIF has few colours
    np.testing.assert_array_equal(ops.decode_box(encoded, tf.constant([1, 2, 3, 4])), whole[1:4, 2:6])


def test_a_bitmap_stored_upside_down_has_a_shape() -> None:
    bitmap = bytearray(_file("BMP", Image.fromarray(PHOTO[:30, :50])))
    bitmap[22:26] = (-30).to_bytes(4, "little", signed=True)
    assert ops.image_shape(tf.constant(bytes(bitmap))).numpy().tolist() == [30, 50]
    np.testing.assert_array_equal(ops.decode(tf.constant(bytes(bitmap))), PHOTO[:30, :50][::-1])


def test_a_gif_smaller_than_its_header_is_cropped_to_its_pixels() -> None:
    gif = bytearray(_file("GIF", Image.fromarray(PHOTO[:30, :50])))
    gif[6:10] = b"\xe8\x03\xe8\x03"
    assert ops.image_shape(tf.constant(bytes(gif))).numpy().tolist() == [1000, 1000]
    for box, shape in (([900, 900, 100, 100], (1, 1, 3)), ([20, 0, 900, 900], (10, 50, 3))):
        assert ops.decode_box(tf.constant(bytes(gif)), tf.constant(box)).shape == shape


def _too_large(kind: str) -> bytes:
    """A picture whose file claims 20000 x 20000 pixels."""
    data = bytearray(_file(kind, Image.fromarray(PHOTO[:8, :8])))
    size = 20_000
    at, claim = {
        "PNG": (16, size.to_bytes(4, "big")),
        "JPEG": (data.find(b"\xff\xc0") + 5, size.to_bytes(2, "big")),
        "GIF": (6, size.to_bytes(2, "little")),
        "BMP": (18, size.to_bytes(4, "little")),
    }[kind]
    data[at : at + 2 * len(claim)] = claim * 2
    return bytes(data)


@pytest.mark.parametrize("use", [ops.image_shape, ops.decode, lambda encoded: _crop(encoded, 0)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_an_image_that_claims_too_many_pixels_is_an_error(kind: str, use: Callable[[tf.Tensor], object]) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError) as found:
        use(tf.constant(_too_large(kind)))
    assert ops.reason(found.value) == "an image of 20000 x 20000 pixels, which must be 1 to 134217728"


@pytest.mark.parametrize("kind", tiered(["JPEG", "PNG", "GIF", "BMP"], {"JPEG", "PNG"}))
def test_truncated_or_corrupt_bytes_are_an_image_or_an_error(kind: str) -> None:
    """Also where TensorFlow would quote the bytes in its message, which Python then cannot read."""
    rng = np.random.default_rng(0)
    whole = _file(kind, Image.fromarray(PHOTO[:20, :30]))
    files = [whole[:length] for length in range(0, 60, 2)]
    for _ in range(60):
        changed = bytearray(whole)
        changed[rng.integers(min(len(whole), 200))] = rng.integers(256)
        files.append(bytes(changed))
    refused = 0
    for file in files:
        for use in (ops.decode, lambda encoded: _crop(encoded, 0)):
            try:
                assert use(tf.constant(file)).dtype == np.uint8
            except tf.errors.InvalidArgumentError:
                refused += 1
    assert 60 <= refused < 2 * len(files)


@pytest.mark.parametrize("where", ["eagerly", "in a pipeline"])
def test_try_or_default_gives_the_result_or_the_default(where: str) -> None:
    default = np.full((4, 4, 3), 7, np.uint8)

    def decode(encoded: tf.Tensor, number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        plus = lambda encoded, number: ops.decode(encoded) + tf.cast(number, tf.uint8)  # noqa: E731
        return ops.try_or_default(plus, encoded, number, default=default)

    files = [
        tf.io.encode_png(PHOTO[:4, :4]),
        tf.constant(b"<html>"),
        tf.io.encode_png(PHOTO[4:8, :4]),
        tf.constant(b""),
    ]
    numbers = tf.range(4)
    if where == "eagerly":
        found = [decode(*both) for both in zip(files, numbers, strict=True)]
    else:
        data = tf.data.Dataset.from_tensor_slices((tf.stack(files), numbers)).map(decode, num_parallel_calls=2)
        assert data.element_spec[0].shape == (4, 4, 3)
        found = list(data)
    assert [bool(good) for _, good in found] == [True, False, True, False]
    expected = [PHOTO[:4, :4], default, PHOTO[4:8, :4] + np.uint8(2), default]
    np.testing.assert_array_equal([image for image, _ in found], expected)


def test_a_reason_is_one_line_without_node_names() -> None:
    def checked(label: tf.Tensor) -> tf.Tensor:
        with tf.control_dependencies([tf.debugging.Assert(label < 10, ["file a, record 3", "has the label", label])]):
            return tf.identity(label)

    reasons = []
    for function, value in ((ops.image_shape, tf.constant(b"")), (checked, tf.constant(12))):
        pipeline = tf.data.Dataset.from_tensors(value).map(function, num_parallel_calls=2).batch(1).prefetch(1)
        for run in (lambda function=function, value=value: function(value), pipeline.as_numpy_iterator().next):
            with pytest.raises(tf.errors.InvalidArgumentError) as found:
                run()
            reasons.append(ops.reason(found.value))
    assert (
        reasons
        == ["by its first bytes it is no JPEG, PNG, GIF or BMP; it has 0 bytes"] * 2
        + ["file a, record 3 has the label 12"] * 2
    )
    assert ops.reason(ValueError("file b cannot be read\nTraceback")) == "file b cannot be read"


def test_grey_is_pillows_brightness() -> None:
    expected = np.asarray(Image.fromarray(PHOTO).convert("L"))[..., None]
    np.testing.assert_array_equal(ops.to_grey(tf.constant(PHOTO)), expected)
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, -1)
    np.testing.assert_array_equal(ops.to_grey(tf.constant(grey)), grey[..., :1])  # a grey file keeps its values
