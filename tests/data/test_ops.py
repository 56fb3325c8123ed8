import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_sample_image

from halvit_jax.data import ops
from halvit_jax.data.pipeline import eval_transform, read_image, train_transform

PHOTO = load_sample_image("china.jpg")  # [427, 640, 3]


def _seed(number: int) -> tf.Tensor:
    return tf.constant([5, number], tf.int64)


def _crop(encoded: tf.Tensor, number: int, *, size: int = 32) -> np.ndarray:
    return ops.random_resized_crop(
        encoded, _seed(number), size=size, method="bilinear", antialias=True, min_area=0.08
    ).numpy()


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_evaluation_equals_pillow(method: str) -> None:
    ours = ops.central_crop(tf.constant(PHOTO), size=224, share=0.875, method=method).numpy().astype(int)
    kernel = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[method]
    resized = Image.fromarray(PHOTO).resize((256 * 640 // 427, 256), kernel)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    theirs = np.asarray(resized.crop((left, top, left + 224, top + 224))).astype(int)
    assert np.abs(ours - theirs).mean() <= 1.0


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    image = tf.constant(PHOTO[:64, :64])
    np.testing.assert_array_equal(ops.central_crop(image, size=64, share=0.875, method="bicubic"), image)


def test_crop_of_undecoded_jpeg_equals_crop_of_decoded() -> None:
    jpeg = tf.io.encode_jpeg(PHOTO, quality=95)
    png = tf.io.encode_png(tf.io.decode_jpeg(jpeg))
    for number in range(5):
        np.testing.assert_allclose(_crop(jpeg, number).astype(int), _crop(png, number).astype(int), atol=1)


def test_crops_cover_areas_and_ratios_as_asked() -> None:
    boxes = np.array([ops._random_box(400, 600, _seed(n), 0.08).numpy() for n in range(500)])
    top, left, height, width = boxes.T
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


def test_a_shape_that_no_box_fits_gets_the_central_one() -> None:
    box = ops._random_box(1000, 10, _seed(0), 0.9).numpy()
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


def test_transform_is_a_function_of_the_seed() -> None:
    transform = train_transform(
        32,
        crop="random_resized",
        min_area=0.08,
        flip=True,
        shift=2,
        rand_augment="rand-m9-mstd0.5-inc1",
        method="bicubic",
        antialias=False,
    )
    jpeg = tf.io.encode_jpeg(PHOTO)
    first = transform(jpeg, _seed(1)).numpy()
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, transform(jpeg, _seed(1)))
    assert (first != transform(jpeg, _seed(2)).numpy()).any()


def test_unknown_crop_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.crop='middle' is not one of random_resized, whole"):
        train_transform(
            8, crop="middle", min_area=0.1, flip=False, shift=0, rand_augment="", method="bicubic", antialias=False
        )


def test_a_file_that_is_no_image_is_refused(tmp_path: object) -> None:
    path = f"{tmp_path}/page.jpg"
    tf.io.write_file(path, "<html>")
    transform = eval_transform(8, share=1.0, method="bilinear")
    with pytest.raises(ValueError, match=r"page.jpg is no image"):
        read_image(path, transform)
    with pytest.raises(ValueError, match=r"nowhere.jpg is no image"):
        read_image(f"{tmp_path}/nowhere.jpg", transform)
