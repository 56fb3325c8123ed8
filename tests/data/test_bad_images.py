"""Image folders with a file that is not an image, or an unusual one; the command's error is in test_image_folder."""

import io
import itertools
import json
import pathlib
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from helpers.tiers import tiered
from PIL import Image
from sklearn.datasets import load_sample_image

from halvit_jax.config import default_config
from halvit_jax.data import ops
from halvit_jax.data.pipeline import Host, Loaders, make_loaders
from halvit_jax.protocols import DataError

ROOT = pathlib.Path(__file__).parents[2]
PHOTO = Image.fromarray(load_sample_image("flower.jpg"))
PIECE = PHOTO.crop((200, 100, 264, 148))  # 64 wide, 48 high
TRAIN, VAL, BATCH, SIZE = 16, 10, 8, 16  # images of a split; rows; pixels
STEPS = TRAIN // BATCH  # of an epoch, which holds every image
HUGE = 20_000
VICTIM = "cat/05.jpg"
Batch = dict[str, np.ndarray]


def _file(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _rotated(jpeg: bytes) -> bytes:
    """The same pixels with the note that they are to be shown turned by a quarter."""
    orientation = struct.pack("<2sHIHHHII", b"II", 42, 8, 1, 0x0112, 3, 1, 6) + bytes(4)
    segment = b"Exif\0\0" + orientation
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


def _png_bomb() -> bytes:
    """A whole PNG of 20000 x 20000 black pixels in 50 kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = zlib.compress(bytes((HUGE // 8 + 1) * HUGE), 1)
    header = struct.pack(">IIBBBBB", HUGE, HUGE, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def _jpeg_bomb() -> bytes:
    """A progressive JPEG, whose decoding begins with space for all coefficients, that claims 20000 x 20000 pixels."""
    jpeg = bytearray(_file(PIECE, progressive=True))
    size = jpeg.index(b"\xff\xc2") + 5
    jpeg[size : size + 4] = struct.pack(">HH", HUGE, HUGE)
    return bytes(jpeg)


GOOD = _file(PIECE, quality=90)
BAD = {  # name -> bytes, and why they cannot be decoded
    "empty": (b"", "by its first bytes it is no JPEG, PNG, GIF or BMP; it has 0 bytes"),
    "truncated": (GOOD[: 9 * len(GOOD) // 10], "jpeg::Uncompress failed. Invalid JPEG data or crop window."),
    "page": (
        b"<html><body>404 Not Found</body></html>",
        "by its first bytes it is no JPEG, PNG, GIF or BMP; it has 39 bytes",
    ),
    "start of a PNG": (_file(PIECE, "PNG")[:12], "an image of 0 x 0 pixels, which must be 1 to 134217728"),
    "truncated PNG": (_file(PIECE, "PNG")[:900], "Invalid PNG data, size 900"),
    "PNG bomb": (_png_bomb(), "an image of 20000 x 20000 pixels, which must be 1 to 134217728"),
    "JPEG bomb": (_jpeg_bomb(), "an image of 20000 x 20000 pixels, which must be 1 to 134217728"),
}
UNUSUAL = {  # name -> bytes
    "PNG": _file(PIECE, "PNG"),
    "PNG with transparency": _file(PIECE.convert("RGBA"), "PNG"),
    "CMYK": _file(PIECE.convert("CMYK"), quality=90),
    "grey": _file(PIECE.convert("L"), quality=90),
    "1x1": _file(PIECE.crop((0, 0, 1, 1))),
    "rotated": _rotated(GOOD),
}


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """root/train/<class>/ and root/val/<class>/ with JPEGs that all differ."""
    for split, count in (("train", TRAIN), ("val", VAL)):
        for number in range(count):
            path = tmp_path / split / ("cat" if number < 8 else "dog") / f"{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            left = 10 * number + (5 if split == "val" else 0)
            path.write_bytes(_file(PHOTO.crop((left, 100, left + 64, 148)), quality=90))
    return tmp_path


def spoil(root: pathlib.Path, name: str, victim: str = VICTIM) -> None:
    """Put a bad file into both splits."""
    for split in ("train", "val"):
        (root / split / victim).write_bytes(BAD[name][0])


def loaders(root: pathlib.Path, on_bad_image: str = "replace", **changes: Any) -> Loaders:
    fields = default_config().data.to_dict() | {
        "name": "folder",
        "root": str(root),
        "eval_split": "val",
        "virtual_shards": 4,
    }
    fields |= {"min_crop_area": 0.9, "on_bad_image": on_bad_image, "batch_size": BATCH, "size": (SIZE, SIZE), "seed": 0}
    return make_loaders(**fields | changes)


def train_batches(made: Loaders, steps: int = STEPS, start: int = 0) -> list[Batch]:
    return list(itertools.islice(made.train.batches(start), steps))


def joined(batches: list[Batch]) -> Batch:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_equal(first: Batch, second: Batch, rows: Any = slice(None)) -> None:
    assert first.keys() == second.keys() == {"image", "label", "mask"}
    for name in first:
        np.testing.assert_array_equal(first[name][rows], second[name][rows])


@pytest.mark.parametrize("name", tiered(UNUSUAL, {"rotated", "grey"}))
def test_an_unusual_image_is_decoded(name: str, root: pathlib.Path) -> None:
    (root / "val" / VICTIM).write_bytes(UNUSUAL[name])
    for on_bad_image in ("error", "replace"):
        (found, _) = loaders(root, on_bad_image, eval_crop=1.0, interpolation="bilinear").evals["eval"].batches()
        assert found["mask"].all()
        stored = Image.open(io.BytesIO(UNUSUAL[name])).convert("RGB")  # which leaves EXIF alone, as we do
        shown = stored.resize((SIZE * stored.width // stored.height, SIZE), Image.Resampling.BILINEAR)
        left = round((shown.width - SIZE) / 2)
        theirs = np.asarray(shown.crop((left, 0, left + SIZE, SIZE))).astype(int)
        assert np.abs(found["image"][5] - theirs).mean() <= 2.0


def test_exif_orientation_is_ignored() -> None:
    assert Image.open(io.BytesIO(UNUSUAL["rotated"])).getexif()[0x0112] == 6
    np.testing.assert_array_equal(ops.decode(UNUSUAL["rotated"]), ops.decode(GOOD))


@pytest.mark.parametrize("name", tiered(BAD, {"page", "truncated"}))
def test_a_decode_error_names_the_file_and_what_to_do(name: str, root: pathlib.Path) -> None:
    spoil(root, name)
    made = loaders(root, "error")
    for split, batches in (("train", made.train.batches()), ("val", made.evals["eval"].batches())):
        with pytest.raises(DataError) as found:
            list(itertools.islice(batches, STEPS))
        why = f"cannot be decoded ({BAD[name][1]}); remove it, or set data.on_bad_image='replace'"
        assert str(found.value) == f"{root}/{split}/{VICTIM} {why}"


@pytest.mark.parametrize("crop", ["random_resized", "whole"])
def test_on_bad_image_replace_gives_grey_and_changes_nothing_else(
    crop: str, root: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    unspoilt = loaders(root, "error", crop=crop)
    good, good_val = joined(train_batches(unspoilt)), joined(list(unspoilt.evals["eval"].batches()))
    assert good["mask"].sum() == TRAIN
    assert good_val["mask"].sum() == VAL
    victims = [f"cat/{number:02d}.jpg" for number in range(1, 6)] + ["dog/09.jpg", "dog/08.jpg"]
    for name, victim in zip(BAD, victims, strict=True):
        spoil(root, name, victim)
    made = loaders(root, crop=crop, bad_image_budget=1.0)
    assert not caplog.records
    found, found_val = joined(train_batches(made)), joined(list(made.evals["eval"].batches()))
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert all(messages.count(f"{root}/{split}/{victim}") == 1 for split in ("train", "val") for victim in victims)
    assert messages.count("7 so far") == 2
    bad = np.flatnonzero(~found["mask"])
    assert (found["image"][bad] == 128).all()
    np.testing.assert_array_equal(found["label"], good["label"])
    assert found["label"][bad].sum() == 2  # and five cats
    assert_equal(found, good, found["mask"])
    # In evaluation they count, or fewer would be scored than there are.
    bad = np.array([1, 2, 3, 4, 5, 8, 9])
    assert (found_val["image"][bad] == 128).all()
    assert_equal({**found_val, "image": good_val["image"]}, good_val)
    assert_equal(found_val, good_val, np.setdiff1d(np.arange(2 * BATCH), bad))


@pytest.fixture
def spoilt(root: pathlib.Path) -> pathlib.Path:
    """Three bad files in each split."""
    for name, victim in (("page", "cat/00.jpg"), ("empty", VICTIM), ("truncated", "dog/09.jpg")):
        spoil(root, name, victim)
    return root


FULL = {"bad_image_budget": 0.5, "shift": 1, "repeated_aug": 2}


@pytest.mark.slow
@pytest.mark.parametrize("hosts", tiered([2, 4], {2}))
def test_replaced_images_resume_and_are_elastic_over_hosts(hosts: int, spoilt: pathlib.Path) -> None:
    reference = train_batches(loaders(spoilt, **FULL), 3 * STEPS)
    assert not all(batch["mask"].all() for batch in reference)
    for start in (1, STEPS, 2 * STEPS + 1):
        for first, second in zip(
            train_batches(loaders(spoilt, **FULL), 3 * STEPS - start, start), reference[start:], strict=True
        ):
            assert_equal(first, second)
    whole_val = joined(list(loaders(spoilt, **FULL).evals["eval"].batches()))
    own = [loaders(spoilt, **FULL, host=Host(index, hosts)) for index in range(hosts)]
    parts = zip(*(train_batches(made, 3 * STEPS) for made in own), strict=True)
    for step, part in enumerate(parts):
        assert_equal(joined(list(part)), reference[step])
    val = joined([batch for made in own for batch in made.evals["eval"].batches()])
    for name in ("image", "label"):
        np.testing.assert_array_equal(val[name][val["mask"]], whole_val[name][:VAL])


def test_exceeding_bad_image_budget_ends_the_epoch(spoilt: pathlib.Path) -> None:
    names = [f"{spoilt}/%s/{victim}" for victim in ("cat/00.jpg", VICTIM, "dog/09.jpg")]
    made = loaders(spoilt, bad_image_budget=2 / TRAIN)
    with pytest.raises(DataError) as found:
        train_batches(made)
    message = "3 images of this epoch cannot be decoded, but only 2 may be: " + ", ".join(names) % (("train",) * 3)
    assert str(found.value) == f"{message}; remove them, or raise data.bad_image_budget"
    with pytest.raises(
        DataError, match=rf"[23] images of this epoch cannot be decoded, but only 1 may be: {spoilt}/val/cat"
    ):
        list(made.evals["eval"].batches())
    generous = loaders(spoilt, bad_image_budget=0.3)  # of 16 and of 10
    assert [joined(train_batches(generous, STEPS, start))["mask"].sum() for start in (0, STEPS)] == [TRAIN - 3] * 2
    assert len(train_batches(generous, 4 * STEPS)) == 4 * STEPS  # every epoch is counted by itself
    assert len(list(generous.evals["eval"].batches())) == 2


def test_a_crop_above_a_truncation_is_decoded(root: pathlib.Path) -> None:
    """A truncated JPEG is bad where its lost part is needed: always as a whole, not for a crop of what is left."""
    spoil(root, "truncated")
    above, below = tf.constant([2, 0, 8, 30]), tf.constant([36, 30, 8, 30])
    np.testing.assert_array_equal(ops.decode_box(BAD["truncated"][0], above), ops.decode_box(GOOD, above))
    for use in (ops.decode, lambda encoded: ops.decode_box(encoded, below)):
        with pytest.raises(tf.errors.InvalidArgumentError, match="Invalid JPEG data or crop window"):
            use(BAD["truncated"][0])
    masks = np.stack([batch["mask"] for batch in train_batches(loaders(root, min_crop_area=0.05), 20 * STEPS)])
    assert set(masks.reshape(20, TRAIN).sum(1)) == {TRAIN, TRAIN - 1}
    with pytest.raises(DataError, match=rf"{root}/train/{VICTIM} cannot be decoded"):
        train_batches(loaders(root, "error", min_crop_area=0.05), 20 * STEPS)


PROGRAM = """
import itertools, json, pathlib
from halvit_jax.config import default_config
from halvit_jax.data import make_loaders
from halvit_jax.protocols import DataError

def peak():
    (line,) = (line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) / 1024

fields = default_config().data.to_dict() | {"name": "folder", "eval_split": "val", "min_crop_area": 0.9}
fields |= {"virtual_shards": 4, "batch_size": 8, "size": (16, 16), "seed": 0}
found, alive = {}, []
for on_bad_image, root in itertools.product(("error", "replace"), ROOTS):
    loaders = make_loaders(**fields | {"root": root, "on_bad_image": on_bad_image})
    for batches in (loaders.train.batches(), loaders.evals["eval"].batches()):
        alive.append(batches)
        try:
            next(batches), next(batches)
        except DataError:
            pass
    found[f"{root}: {on_bad_image}"] = peak()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_decompression_bomb_takes_no_memory_and_a_process_may_exit_while_images_are_replaced(
    root: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Measured in a separate process, which exits while the loaders read ahead."""
    roots = [str(root)]
    for name in ("PNG bomb", "JPEG bomb"):
        roots.append(str(tmp_path_factory.mktemp("bomb") / "images"))
        subprocess.run(["cp", "-r", str(root), roots[-1]], check=True)
        spoil(pathlib.Path(roots[-1]), name)
    program = PROGRAM.replace("ROOTS", repr(roots))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    peaks = list(json.loads(done.stdout.splitlines()[-1]).values())
    assert len(peaks) == 6
    # MB. Decoded, the PNG has 1200 and the JPEG's coefficients 2400; what the later loaders add is about 100.
    assert peaks[-1] - peaks[0] < 600
    assert "Exception" not in done.stderr
    assert "Traceback" not in done.stderr
