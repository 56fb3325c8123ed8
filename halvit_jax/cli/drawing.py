"""Detections drawn over their image, as a PNG file, with matplotlib."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from halvit_jax.text import pip_install

COLOURS = ("#ff5a46", "#50c878", "#468cff", "#fac832", "#c864f0", "#3cd2dc")
MIN_SIDE = 480  # pixels of a drawing


def check(detects: bool, folder: str, images: Sequence[str]) -> None:
    """Create the folder for the drawings of a detector.

    Raises:
        ValueError: the model detects nothing, matplotlib is not installed, or two images would have the same file.
    """
    if not detects:
        raise ValueError(f"--draw={folder} is for runs with task.name='detection', and this one classifies")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--draw needs matplotlib: {pip_install('plot')}") from error
    files = [file_of(folder, image) for image in images]
    twice = sorted({str(file) for file in files if files.count(file) > 1})
    if twice:
        raise ValueError(f"--draw={folder}: two images would be written to {twice[0]}; give them in two calls")
    os.makedirs(folder, exist_ok=True)


def file_of(folder: str, image: str) -> pathlib.Path:
    """Where the drawing of an image goes."""
    return pathlib.Path(folder, f"{pathlib.Path(image).stem}.png")


def draw(image: np.ndarray, detections: Sequence[Mapping[str, Any]], file: pathlib.Path) -> None:
    """Write an image, uint8 [h, w, 3], with the boxes, classes, scores and masks of `Detection.decode`."""
    from matplotlib import figure, patches
    from pycocotools import mask

    height, width = image.shape[:2]
    scale = max(1.0, MIN_SIDE / max(height, width))
    chart = figure.Figure(figsize=(width * scale / 100, height * scale / 100), dpi=100)
    axes = chart.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(image, extent=(0, width, height, 0))
    for found in reversed(detections):  # the best one on top
        colour = COLOURS[int(found["category_id"]) % len(COLOURS)]
        x, y, w, h = found["bbox"]
        if "segmentation" in found:
            bits = mask.decode(found["segmentation"]).astype(float)
            filled = np.zeros((height, width, 4))
            filled[..., :3] = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            filled[..., 3] = 0.4 * bits
            axes.imshow(filled, extent=(0, width, height, 0))
        axes.add_patch(patches.Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=1.5))
        label = f"{found['class']} {found['score']:.2f}"
        axes.text(x, y, label, fontsize=7, color="white", va="bottom", bbox={"facecolor": colour, "pad": 1, "lw": 0})
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    chart.savefig(file)
