"""Photographs as files, and ways to evaluate them: what `tests/golden/timm_eval.npz` holds timm's pixels of."""

import io
import pathlib
from typing import Any

import numpy as np
import sklearn.datasets
from PIL import Image

EVERY = 13  # pixels of the golden file: every thirteenth in both directions
WAYS: dict[str, dict[str, Any]] = {  # keywords of timm's create_transform
    "224": {"input_size": 224, "crop_pct": 0.875, "interpolation": "bicubic"},
    "bilinear": {"input_size": 224, "crop_pct": 0.875, "interpolation": "bilinear"},
    "rsb": {"input_size": 224, "crop_pct": 0.95, "interpolation": "bicubic"},
    "torchvision": {"input_size": 224, "crop_pct": 0.965, "interpolation": "bilinear"},
    "256": {"input_size": 256, "crop_pct": 0.875, "interpolation": "bicubic"},
    "384": {"input_size": 384, "crop_pct": 0.875, "interpolation": "bicubic"},
    "squash": {"input_size": 384, "crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash"},
    "larger": {"input_size": 512, "crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash"},
}


def photographs() -> dict[str, bytes]:
    """The two photographs of scikit-learn as their JPEG files, and pieces of them of other proportions as PNG."""
    folder = pathlib.Path(sklearn.datasets.__file__).parent / "images"
    files = {name: (folder / f"{name}.jpg").read_bytes() for name in ("china", "flower")}
    china, flower = (np.asarray(Image.open(io.BytesIO(file))) for file in files.values())
    pieces = {"tall": china[:, 100:301], "wide": flower[150:271], "small": china[200:350, 200:321]}
    return files | {name: _png(pixels) for name, pixels in pieces.items()}


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
