"""The embedded data set: the 1,797 handwritten digits of 8x8 pixels that ship inside scikit-learn, as a TFDS builder.

Source: the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998, UCI repository, CC BY
4.0). Nothing is downloaded.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

TEST_EVERY = 5  # every fifth example of a class belongs to the test split


class Digits(tfds.core.GeneratorBasedBuilder):
    """8x8 grey digits, split 80/20 within each class by a fixed rule."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="8x8 grey images of handwritten digits.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples(test=False), "test": self._generate_examples(test=True)}

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        seen = np.zeros(10, int)
        for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            for_test = seen[label] % TEST_EVERY == 0
            seen[label] += 1
            if for_test == test:
                pixels = np.round(image * (255 / 16)).astype(np.uint8)[..., None]  # [8, 8, 1]
                yield index, {"image": pixels, "label": int(label)}
