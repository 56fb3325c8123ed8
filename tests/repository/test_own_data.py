"""The story of docs/own_data.md: its commands, as printed there, on a folder as a phone and a scraper leave it."""

import csv
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from helpers.pages import DOCS, ROOT, blocks
from PIL import Image

COMMANDS = [
    line for line in blocks((DOCS / "own_data.md").read_text(), "bash")[0].replace("\\\n", " ").splitlines() if line
]
SMALL = (
    "--config.total_steps=30 --config.num_epochs=0 --config.batch_size=16 --config.model.image_size=16 "
    "--config.model.patch_size=4 --config.model.width=24 --config.model.depth=1 --config.model.num_heads=2 "
    "--config.optim.warmup_epochs=0.0 --config.optim.scaling=none --config.data.virtual_shards=1"
)


def take_photos(folder: pathlib.Path, count: int, rng: np.random.Generator) -> None:
    """Red and blue pictures in sub-folders, some of them rotated, some of them called what they are not."""
    for name, colour in {"sky": (40, 60, 220), "wall": (220, 60, 40)}.items():
        for number in range(count):
            path = folder / name / f"2021-{number % 3}" / f"IMG_{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(np.array(colour) + rng.normal(0, 25, (24, 32, 3)), 0, 255).astype(np.uint8)
            exif = Image.Exif()
            exif[0x0112] = 6
            kind = {0: "PNG", 1: "WEBP"}.get(number % 7, "JPEG")
            Image.fromarray(pixels).save(path, kind, **({"exif": exif} if kind == "JPEG" else {}))


def test_the_story_has_no_more_than_six_commands() -> None:
    assert 1 <= len(COMMANDS) <= 6


@pytest.mark.slow
def test_the_story_of_own_data_runs_as_it_is_written(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    take_photos(tmp_path / "PHOTOS", 30, rng)
    take_photos(tmp_path / "NEW", 3, rng)
    broken = tmp_path / "PHOTOS/sky/2021-0/broken.jpg"
    broken.write_bytes(b"<html>404</html>")
    (tmp_path / "PHOTOS/wall/Thumbs.db").write_bytes(b"")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    out = []
    for command, code in zip(COMMANDS, (2, 0, 0, 0, 0), strict=True):
        words = [
            sys.executable,
            *shlex.split(command)[1:],
            *(shlex.split(SMALL) if "--config=configs" in command else []),
        ]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr
        out.append(done.stdout + done.stderr)
    checked, trained, evaluated, predicted, exported = out
    assert f"PHOTOS/sky/2021-0/{broken.name}: by its first bytes it is no JPEG, PNG, GIF or BMP" in checked
    assert "1 files passed over, 1 .db" in checked
    assert "1 of 61 images cannot be decoded" in checked
    for printed in (trained, evaluated):  # by both splits, and once for both
        assert printed.count("WARNING: PHOTOS: 1 files passed over, 1 .db") == 1
    assert "balanced accuracy, the mean over 2 classes" in evaluated
    assert len(list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))) == 12
    rows = [json.loads(line) for line in predicted.splitlines() if line.startswith("{")]
    assert len(rows) == 6
    right = [pathlib.Path(row["image"]).parts[1] == row["top2"][0]["class"] for row in rows if "top2" in row]
    right += [pathlib.Path(row["image"]).parts[1] == row["top5"][0]["class"] for row in rows if "top5" in row]
    assert np.mean(right) >= 5 / 6
    assert re.search(r"the same best answer for 12 of the 12 images of the evaluation set", exported)
    assert (tmp_path / "photos.zip").exists()
