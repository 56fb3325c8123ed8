"""Writes timm_eval.npz: timm's evaluation transform of photographs; needs torchvision and timm, made with timm 1.0.31.

PYTHONPATH=tests python tests/golden/timm_eval.py
"""

import io
import pathlib

import numpy as np
from helpers.photographs import EVERY, WAYS, photographs
from PIL import Image
from timm.data import create_transform

pixels = {}
for way, keywords in WAYS.items():
    transform = create_transform(**keywords, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), is_training=False)
    for name, file in photographs().items():
        image = transform(Image.open(io.BytesIO(file)).convert("RGB")).permute(1, 2, 0).numpy()  # [h, w, 3] in [0, 1]
        pixels[f"{way}/{name}"] = np.round(255 * image[::EVERY, ::EVERY]).astype(np.uint8)
np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **pixels)
