"""Transforms as the loaders use them: their order, their seeds, what they refuse. The operations are in test_ops."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from helpers.photographs import EVERY, WAYS, photographs
from helpers.tiers import tiered
from PIL import Image
from sklearn.datasets import load_sample_image

from halvit_jax.data import augment, ops
from halvit_jax.data.transforms import Transform, eval_transform, read_image, train_transform

PHOTO = load_sample_image("flower.jpg")[100:300, 150:400]  # [200, 250, 3]
JPEG = tf.io.encode_jpeg(PHOTO, quality=95)
HTML = {"image": tf.constant(b"<html>")}
SIZE = 32
PLAIN = {
    "crop": "whole",
    "min_area": 0.08,
    "flip": False,
    "shift": 0,
    "policy": "",
    "color_jitter": 0.0,
    "method": "bilinear",
    "antialias": True,
}
FULL = {"crop": "random_resized", "flip": True, "shift": 2, "policy": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4}
# What is switched on alone -> what is done, and with which number the seed is folded.
AUGMENTATIONS: dict[str, tuple[dict[str, Any], int, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]]] = {
    "flip": ({"flip": True}, 1, ops.random_flip),
    "shift": ({"shift": 3}, 2, lambda image, seed: ops.random_shift(image, seed, pixels=3)),
    "trivial": ({"policy": "trivial"}, 3, augment.trivial_augment),
    "three": ({"policy": "three"}, 3, augment.three_augment),
    "rand": (
        {"policy": "rand-m7-n3"},
        3,
        lambda image, seed: augment.rand_augment(
            image, seed, ops=3, magnitude=7.0, magnitude_std=0.0, increasing=False, interpolation="bilinear"
        ),
    ),
    "color_jitter": (
        {"color_jitter": 0.4},
        4,
        lambda image, seed: augment.color_jitter(image, seed, brightness=0.4, contrast=0.4, saturation=0.4),
    ),
}


def train(**changes: Any) -> Transform:
    return train_transform((SIZE, SIZE), **PLAIN | changes)


def seed(number: int) -> tf.Tensor:
    return tf.constant([5, number], tf.int64)


def images(transform: Transform, numbers: range, encoded: tf.Tensor = JPEG) -> np.ndarray:
    """The images of a file for some seeds."""
    examples = [transform({"image": encoded}, seed(number)) for number in numbers]
    assert all(example["decoded"] for example in examples)
    return np.stack([example["image"] for example in examples])


def in_pipeline(transform: Transform, count: int, encoded: tf.Tensor = JPEG) -> np.ndarray:
    """The images of a file for the first seeds, made as the loaders make them."""
    data = tf.data.Dataset.range(count).map(lambda n: transform({"image": encoded}, tf.stack([5, n]))["image"])
    return np.stack(list(data.as_numpy_iterator()))


def test_a_plain_transform_resizes_the_whole_image() -> None:
    found = images(train(), range(2))
    expected = ops.resize(ops.decode(JPEG), (SIZE, SIZE), method="bilinear", antialias=True)
    np.testing.assert_array_equal(found[0], expected)
    np.testing.assert_array_equal(found[1], expected)


def test_interpolation_and_antialias_change_the_resize() -> None:
    for crop in ("whole", "random_resized"):
        ways = [{"method": method, "antialias": a} for method in ("bilinear", "bicubic") for a in (False, True)]
        found = {images(train(crop=crop, **way), range(1)).tobytes() for way in ways}
        assert len(found) == 4
    whole = images(train(method="bicubic", antialias=False), range(1))[0]
    expected = ops.resize(ops.decode(JPEG), (SIZE, SIZE), method="bicubic", antialias=False)
    np.testing.assert_array_equal(whole, expected)


def test_a_random_crop_takes_at_least_min_crop_area(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, draw = [], ops.random_box
    monkeypatch.setattr(ops, "random_box", lambda *given: boxes.append(draw(*given)) or boxes[-1])
    for least in (0.08, 0.9):
        boxes.clear()
        for number in range(30):
            train(crop="random_resized", min_area=least)({"image": JPEG}, seed(number))
        shares = [float(box[2] * box[3]) / (200 * 250) for box in boxes]
        assert 0.95 * least < min(shares) < least + 0.1


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_augmentation_has_its_own_seed(name: str) -> None:
    """So switching one on or off leaves what the others draw."""
    fields, number, change = AUGMENTATIONS[name]
    found = images(train(**fields), range(12))
    plain = tf.constant(images(train(), range(1))[0])
    expected = [change(plain, ops.fold_in(seed(i), number)).numpy() for i in range(12)]
    np.testing.assert_array_equal(found, np.stack(expected))
    assert len({image.tobytes() for image in found}) > 1


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_leaves_the_seed_of_the_crop(name: str) -> None:
    fields, number, change = AUGMENTATIONS[name]
    cropped = images(train(crop="random_resized"), range(4))
    found = images(train(crop="random_resized", **fields), range(4))
    expected = [change(tf.constant(cropped[i]), ops.fold_in(seed(i), number)).numpy() for i in range(4)]
    np.testing.assert_array_equal(found, np.stack(expected))


def test_augmentations_come_in_the_order_of_the_fields() -> None:
    found = images(train(**FULL), range(4))
    for i in range(4):
        image = tf.constant(images(train(crop="random_resized"), range(i, i + 1))[0])
        image = ops.random_flip(image, ops.fold_in(seed(i), 1))
        image = ops.random_shift(image, ops.fold_in(seed(i), 2), pixels=2)
        image = augment.rand_augment(image, ops.fold_in(seed(i), 3), interpolation="bilinear")
        image = AUGMENTATIONS["color_jitter"][2](image, ops.fold_in(seed(i), 4))
        np.testing.assert_array_equal(found[i], image)


def test_rand_augment_fills_with_the_mean_of_the_data() -> None:
    black, found = tf.io.encode_png(np.zeros((SIZE, SIZE, 3), np.uint8)), []
    for mean, fill in (((0.485, 0.456, 0.406), (124, 116, 104)), ((0.5, 0.25, 1.0), (128, 64, 255))):
        found.append(images(train(policy="rand-m10-p1", mean=mean), range(8), black))
        policy = augment.parse_policy("rand-m10-p1", interpolation="bilinear", fill=fill)
        for i in range(8):
            expected = policy(tf.zeros((SIZE, SIZE, 3), tf.uint8), ops.fold_in(seed(i), 3))
            np.testing.assert_array_equal(found[-1][i], expected)
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("on_bad_image", tiered(["error", "replace"], {"error"}))
def test_a_transform_is_a_function_of_record_and_seed(on_bad_image: str) -> None:
    transform = train(**FULL, on_bad_image=on_bad_image)
    found = in_pipeline(transform, 6)
    assert found.shape == (6, SIZE, SIZE, 3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, images(transform, range(6)))
    assert len({image.tobytes() for image in found}) == 6
    np.testing.assert_array_equal(found, images(train(**FULL), range(6)))  # whatever the policy for bad images
    other = tf.io.encode_jpeg(PHOTO[::-1], quality=95)
    assert (images(transform, range(3, 4), other)[0] != found[3]).any()


def test_other_features_of_a_record_travel_along() -> None:
    record = {"image": JPEG, "label": tf.constant(3), "boxes": tf.zeros((2, 4)), "name": tf.constant("flower.jpg")}
    for transform in (train(**FULL), eval_transform((24, 40), fraction=0.875, method="bicubic")):
        example = transform(record, seed(0))
        assert example.keys() == record.keys() | {"decoded"}
        assert all(example[name] is record[name] for name in ("label", "boxes", "name"))
    assert example["image"].shape == (24, 40, 3)


@pytest.mark.parametrize("crop", ["whole", "random_resized"])
def test_undecodable_bytes_are_an_error_or_grey(crop: str) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="by its first bytes it is no JPEG"):
        train(crop=crop)(HTML, seed(0))
    example = train(crop=crop, on_bad_image="replace")(HTML, seed(0))
    assert not example["decoded"]
    np.testing.assert_array_equal(example["image"], np.full((SIZE, SIZE, 3), 128))
    with pytest.raises(tf.errors.InvalidArgumentError, match="by its first bytes it is no JPEG"):
        eval_transform((SIZE, SIZE), fraction=0.875, method="bicubic")(HTML, seed(0))
    example = eval_transform((SIZE, SIZE), fraction=0.875, method="bicubic", on_bad_image="replace")(HTML, seed(0))
    assert not example["decoded"]
    np.testing.assert_array_equal(example["image"], np.full((SIZE, SIZE, 3), 128))


@pytest.mark.parametrize("on_bad_image", ["error", "replace"])
@pytest.mark.parametrize("fraction", [0.875, 1.0])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_eval_transform_equals_pillow_and_needs_no_seed(method: str, fraction: float, on_bad_image: str) -> None:
    transform = eval_transform((SIZE, SIZE), fraction=fraction, method=method, on_bad_image=on_bad_image)
    found = images(transform, range(2))
    np.testing.assert_array_equal(found[0], found[1])
    short = int(SIZE / fraction)
    kernel = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[method]
    resized = Image.fromarray(ops.decode(JPEG).numpy()).resize((short * 250 // 200, short), kernel)
    left, top = round((resized.width - SIZE) / 2), round((resized.height - SIZE) / 2)
    theirs = np.asarray(resized.crop((left, top, left + SIZE, top + SIZE))).astype(int)
    assert np.abs(found[0] - theirs).mean() <= 1.0


def test_eval_transform_crops_an_image_of_the_right_size_too() -> None:
    encoded = tf.io.encode_png(PHOTO[:SIZE, :SIZE])
    transform = eval_transform((SIZE, SIZE), fraction=0.875, method="bicubic", on_bad_image="replace")
    inside = in_pipeline(transform, 1, encoded)[0]
    np.testing.assert_array_equal(transform({"image": encoded}, seed(0))["image"], inside)
    assert (inside != PHOTO[:SIZE, :SIZE]).any()


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"data\.crop='middle' is not one of random_resized, whole", {"crop": "middle"}),
        (r"data\.interpolation='cubic' is not one of bilinear, bicubic", {"method": "cubic"}),
        (r"data\.on_bad_image='skip' is not one of error, replace", {"on_bad_image": "skip"}),
        (r"data\.min_crop_area=0\.0 must lie in \(0, 1\]", {"min_area": 0.0}),
        (r"data\.min_crop_area=1\.5 must lie in \(0, 1\]", {"min_area": 1.5}),
        (r"data\.min_crop_area=nan must lie in \(0, 1\]", {"min_area": float("nan")}),
        (r"data\.shift=-1 must not be negative", {"shift": -1}),
        (r"data\.color_jitter=-0\.1 must not be negative", {"color_jitter": -0.1}),
        (r"data\.augment='rand-x9' is not understood; give 'trivial', 'three', or 'rand'", {"policy": "rand-x9"}),
        (r"data\.augment='Trivial' is not understood", {"policy": "Trivial"}),
    ],
)
def test_invalid_values_of_training_are_errors(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        train(**changes)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"data\.eval_crop=0\.0 must lie in \(0, 1\]", {"fraction": 0.0}),
        (r"data\.eval_crop=1\.1 must lie in \(0, 1\]", {"fraction": 1.1}),
        (r"data\.eval_resize='pad' is not one of short_side, squash", {"resize": "pad"}),
        (r"data\.interpolation='lanczos' is not one of bilinear, bicubic", {"method": "lanczos"}),
        (r"data\.on_bad_image='' is not one of error, replace", {"on_bad_image": ""}),
    ],
)
def test_invalid_values_of_evaluation_are_errors(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        eval_transform((SIZE, SIZE), **{"fraction": 0.875, "method": "bicubic"} | changes)


def test_read_image_transforms_as_in_evaluation(tmp_path: pathlib.Path) -> None:
    transform = eval_transform((SIZE, SIZE), fraction=0.875, method="bicubic")
    (tmp_path / "flower.jpg").write_bytes(JPEG.numpy())
    found = read_image(str(tmp_path / "flower.jpg"), transform)
    np.testing.assert_array_equal(found, images(transform, range(1))[0])


def test_read_image_answers_an_undecodable_file_with_one_line(tmp_path: pathlib.Path) -> None:
    transform = eval_transform((8, 8), fraction=1.0, method="bilinear")
    for name, content, why in (
        ("page.jpg", b"<html>", "by its first bytes it is no JPEG, PNG, GIF or BMP; it has 6 bytes"),
        ("empty.jpg", b"", "by its first bytes it is no JPEG, PNG, GIF or BMP; it has 0 bytes"),
        ("start.png", b"\x89PNG", "an image of 0 x 0 pixels, which must be 1 to 134217728"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"/{name} is not an image that can be read: {why}$"):
            read_image(str(tmp_path / name), transform)
    with pytest.raises(ValueError, match=r"^/.*/nowhere.jpg is not an image that can be read: .*No such file"):
        read_image(str(tmp_path / "nowhere.jpg"), transform)


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_has_the_pixels_of_timms_transform_on_photographs(way: str, golden: pathlib.Path) -> None:
    """Pillow rounds between the two passes of a resize and TensorFlow does not: a quarter of a grey level."""
    fields = WAYS[way]
    resize = {"center": "short_side", "squash": "squash"}[fields.get("crop_mode", "center")]
    method, size = fields["interpolation"], (fields["input_size"],) * 2
    transform = eval_transform(size, fraction=fields["crop_pct"], method=method, resize=resize)
    with np.load(golden / "timm_eval.npz") as expected:
        for name, file in photographs().items():
            image = transform({"image": tf.constant(file)}, tf.zeros(2, tf.int64))["image"].numpy()[::EVERY, ::EVERY]
            difference = np.abs(image.astype(int) - expected[f"{way}/{name}"])
            assert difference.mean() < 0.3, name
            assert difference.max() <= 8, name


@pytest.mark.parametrize("make", ["train", "eval"])
def test_grey_images_are_the_brightness_of_what_else_is_seen(make: str) -> None:
    def transform(channels: int) -> Transform:
        if make == "eval":
            return eval_transform((8, 8), fraction=1.0, method="bilinear", channels=channels)
        how = {"crop": "random_resized", "min_area": 0.1, "flip": True, "shift": 1, "policy": "rand-m9-mstd0.5-inc1"}
        colours = {"color_jitter": 0.3, "method": "bilinear", "antialias": False}
        mean = (0.5,) if channels == 1 else (0.5, 0.5, 0.5)
        return train_transform((8, 8), **how, **colours, channels=channels, mean=mean)

    record = {"image": tf.io.encode_png(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)), "label": 3}
    seed = tf.constant([1, 2], tf.int64)
    colour, grey = (transform(channels)(record, seed)["image"] for channels in (3, 1))
    assert grey.shape == (8, 8, 1)
    np.testing.assert_array_equal(grey, ops.to_grey(colour))
    with pytest.raises(ValueError, match=r"model.in_channels=5: image files are read with 3 channels, or 1 \(grey\)"):
        transform(5)
