import json
import pathlib

import jax
import numpy as np
import pytest
import tensorflow as tf
from helpers import small_coco
from PIL import Image

from halvit_jax.data.coco import read_index
from halvit_jax.data.instances import CROP, Rows, crop
from halvit_jax.protocols import DataError

SIDES = {"short_side": 0, "long_side": 0}


def _rows(folder: pathlib.Path, *, masks: bool = True) -> Rows:
    small_coco.write(folder, small_coco.content())
    index = read_index(str(folder / "train.json"), field="instances.train_annotations", masks=masks)
    return Rows(index, str(folder / "train"), max_objects=4, masks=masks)


def test_a_row_has_the_image_in_the_upper_left_corner_and_its_objects(tmp_path: pathlib.Path) -> None:
    row = _rows(tmp_path).make(2, (64, 80), **SIDES, flip=False)
    pixels = np.asarray(Image.open(tmp_path / "train" / "2.png"))
    np.testing.assert_array_equal(row["image"][:50, :50], pixels)
    assert not row["image"][50:].any()
    assert not row["image"][:, 50:].any()
    assert row["size"].tolist() == row["original"].tolist() == [50, 50]
    assert row["image_id"] == 102
    assert row["boxes"].tolist() == [[4, 5, 24, 15], [5, 5, 25, 16], [0] * 4, [0] * 4]
    assert row["label"].tolist() == [2, 1, 0, 0]
    assert row["real"].tolist() == [True, True, False, False]
    assert (row["crops"][:2] == 255).all()
    assert not row["crops"][2:].any()
    assert {name: (array.dtype.name, array.shape) for name, array in row.items()} == {
        "image": ("uint8", (64, 80, 3)),
        "size": ("int32", (2,)),
        "original": ("int32", (2,)),
        "image_id": ("int32", ()),
        "boxes": ("float32", (4, 4)),
        "label": ("int32", (4,)),
        "real": ("bool", (4,)),
        "crops": ("uint8", (4, CROP, CROP)),
        "mask": ("bool", ()),
    }


def test_a_filling_row_has_the_same_shapes_and_no_mask(tmp_path: pathlib.Path) -> None:
    rows = _rows(tmp_path)
    row, filling = rows.make(2, (64, 80), **SIDES, flip=False), rows.filling((64, 80))
    shapes = [{name: (array.dtype, array.shape) for name, array in made.items()} for made in (row, filling)]
    assert shapes[0] == shapes[1]
    assert row["mask"]
    assert not any(array.any() for array in filling.values())


def test_boxes_follow_the_ratio_of_each_axis_in_a_resize(tmp_path: pathlib.Path) -> None:
    row = _rows(tmp_path).make(1, (100, 100), short_side=63, long_side=90, flip=False)  # of 60 x 40
    height, width = 90, 60
    assert row["size"].tolist() == [height, width]
    assert row["original"].tolist() == [60, 40]
    np.testing.assert_allclose(row["boxes"][0], np.array([4, 5, 24, 15]) * [1.5, 1.5, 1.5, 1.5])
    odd = _rows(tmp_path / "odd").make(1, (100, 100), short_side=23, long_side=90, flip=False)
    assert odd["size"].tolist() == [35, 23]  # 34.5 rounded half up
    np.testing.assert_allclose(odd["boxes"][0], np.array([4, 5, 24, 15]) * np.tile([23 / 40, 35 / 60], 2))


def test_a_resize_is_bilinear_with_half_pixel_centres_and_no_antialias(tmp_path: pathlib.Path) -> None:
    row = _rows(tmp_path).make(0, (64, 64), short_side=20, long_side=30, flip=False)  # of 40 x 60: half
    pixels = np.asarray(Image.open(tmp_path / "train" / "0.png")).astype(np.float32)
    means = pixels.reshape(20, 2, 30, 2, 3).mean((1, 3))  # at half the size each centre lies between 2 x 2 pixels
    np.testing.assert_allclose(row["image"][:20, :30], means, atol=0.51)


def test_a_flip_mirrors_image_boxes_and_crops(tmp_path: pathlib.Path) -> None:
    content = small_coco.content()
    triangle = [4, 5, 24, 5, 4, 25]
    content["annotations"] = [small_coco.box(100, [4, 5, 20, 20], segmentation=[triangle])]
    small_coco.write(tmp_path, content)
    index = read_index(str(tmp_path / "train.json"), field="instances.train_annotations")
    rows = Rows(index, str(tmp_path / "train"), 4, True)
    plain, flipped = (rows.make(0, (64, 80), **SIDES, flip=flip) for flip in (False, True))
    np.testing.assert_array_equal(flipped["image"][:40, :60], plain["image"][:40, :60][:, ::-1])
    assert not flipped["image"][:, 60:].any()
    assert flipped["boxes"][0].tolist() == [60 - 24, 5, 60 - 4, 25]
    assert not flipped["boxes"][1:].any()
    np.testing.assert_array_equal(flipped["crops"], plain["crops"][:, :, ::-1])
    assert plain["crops"][0, :50, :50].min() == 255
    assert plain["crops"][0, -40:, -40:].max() == 0


def test_without_masks_there_are_no_crops(tmp_path: pathlib.Path) -> None:
    rows = _rows(tmp_path, masks=False)
    assert "crops" not in rows.make(2, (64, 80), **SIDES, flip=True) | rows.filling((64, 80))


def test_a_crop_holds_the_covered_share_of_every_cell() -> None:
    bitmap = np.zeros((8, 8), np.uint8)
    bitmap[2:6, 2:5] = 1
    np.testing.assert_array_equal(crop(bitmap, np.array([2, 2, 5, 6.0]), 4), 255)
    # A cell of [1.5, 2.5) x [1.5, 2.5) is covered by a quarter.
    np.testing.assert_array_equal(crop(bitmap, np.array([1.5, 1.5, 3.5, 3.5]), 2), [[64, 128], [128, 255]])
    whole = crop(bitmap, np.array([0, 0, 8, 8.0]), 4).astype(float)
    assert whole.sum() * 4 == pytest.approx(255 * 12, abs=8)


def test_targets_from_crops_are_those_from_bitmaps_but_for_a_few_thousandths(golden: pathlib.Path) -> None:
    """0.39 % of the pixels differ here, where objects are small: most of them in one that is 6 pixels wide."""
    from halvit_jax.detection.targets import mask_targets

    info = json.loads((golden / "detection/masks.json").read_text())
    arrays = np.load(golden / "detection/masks.npz")
    h, w = info["height"], info["width"]
    count = len(info["segmentations"])
    bitmaps = np.unpackbits(arrays["bitmaps"])[: count * h * w].reshape(-1, h, w)
    regions = np.array(info["bbox_of_mask"], np.float32)
    crops = np.stack([crop(bitmap, box) for bitmap, box in zip(bitmaps, regions, strict=True)])
    which = arrays["object"]
    found = np.asarray(jax.jit(mask_targets)(crops[which], regions[which], arrays["proposals"]))
    expected = np.unpackbits(arrays["targets"])[: found.size].reshape(found.shape)
    assert (found != expected).mean() < 0.004


def test_a_file_that_is_missing_broken_or_of_another_size_is_named(tmp_path: pathlib.Path) -> None:
    rows = _rows(tmp_path)
    path = tmp_path / "train" / "0.png"  # 40 rows, 60 columns
    Image.new("RGB", (40, 60)).save(path)
    with pytest.raises(DataError, match=f"{path} has 60 rows and 40 columns, but .* 40 and 60; .*EXIF orientation"):
        rows.read(0)
    Image.new("RGB", (61, 40)).save(path)
    with pytest.raises(DataError, match=f"{path} has 40 rows and 61 columns, but .*train.json says 40 and 60; correct"):
        rows.make(0, (64, 80), **SIDES, flip=False)
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=f"{path} cannot be decoded: .*; replace it"):
        rows.read(0)
    path.unlink()
    with pytest.raises(DataError, match=f"{path}, which .*train.json lists, is missing"):
        rows.read(0)


def test_an_image_with_an_exif_orientation_is_decoded_as_it_is_stored(tmp_path: pathlib.Path) -> None:
    rows = _rows(tmp_path)
    image = Image.new("RGB", (40, 60))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "train" / "0.png", exif=exif)
    with pytest.raises(DataError, match="its sides are swapped: an EXIF orientation, which is not applied here"):
        rows.read(0)
    assert isinstance(rows.path(0), str)
    assert tf.io.gfile.exists(rows.path(0))
