"""A trained model with all that it needs to be used: preprocessing, classes, batches."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from halvit_jax import storage
from halvit_jax.convert import hub, readers, weights_file
from halvit_jax.experiment.trained import CONFIG, Trained, at_size, fit, load_trained
from halvit_jax.models import create_model
from halvit_jax.protocols import DatasetInfo, PyTree
from halvit_jax.tasks.classification import Classification

Image = Any  # a path, an array uint8 [h, w, 3] or [h, w], or an image of Pillow
PREPROCESSING = {"crop": "fraction", "interpolation": "method", "resize": "resize", "exif_rotation": "exif_rotation"}
"""Name in an exported description -> keyword of `data.eval_transform`."""


class Predictor:
    """A trained model that takes images as they come.

    predictor("a.jpg")                     one decoded output, such as {"top5": [{"class": ..., "probability": ...}]}
    predictor(["a.jpg", array, image])     a list of them; arrays are uint8 [h, w, 3], images are Pillow's
    predictor.preprocess(image)            uint8 [height, width, c], resized and cropped as in evaluation
    predictor.outputs(images)              the outputs, such as logits, for a batch of preprocessed images

    Attributes:
        model: the Flax module, without preprocessing; None where the task has several.
        variables: of the model, {"params": ..., ...}.
        labels: the names of the classes.
    """

    def __init__(self, task: Any, variables: PyTree, info: DatasetInfo, preprocessing: Mapping[str, Any]) -> None:
        from halvit_jax import data

        data.hide_accelerators()
        self.model, self.variables, self.labels = getattr(task, "model", None), variables, list(info.class_names)
        self._task, self._info = task, info
        self.serving = task.serving(variables, folded=False)
        self._apply = jax.jit(self.serving.apply)
        self._transform = data.eval_transform(self.serving.input_size, channels=self.serving.channels, **preprocessing)

    def __call__(self, images: Image | Sequence[Image], *, batch_size: int = 32, **decoding: Any) -> Any:
        """The decoded output of one image, or a list of them for a list; `top` is how many classes are listed.

        Raises:
            ValueError: an image that cannot be read, by name.
        """
        several = isinstance(images, list | tuple)
        rows = [self.preprocess(image) for image in (images if several else [images])]
        found = list(self.decoded(rows, batch_size=batch_size, **decoding))
        return found if several else found[0]

    def preprocess(self, image: Image) -> np.ndarray:
        """The image as the model takes it: uint8 [height, width, c]. The model normalises it itself.

        Raises:
            ValueError: the image cannot be read.
        """
        from halvit_jax import data

        if isinstance(image, str | os.PathLike):
            return data.read_image(os.path.expanduser(os.fspath(image)), self._transform)
        if hasattr(image, "convert"):  # Pillow's
            image = np.asarray(image.convert("RGB"))
        return data.transform_array(np.asarray(image), self._transform)

    def outputs(self, images: np.ndarray) -> PyTree:
        """The outputs of the model for preprocessed images [b, height, width, c]."""
        return self._apply(self.serving.variables, images)

    def decoded(self, images: Iterable[np.ndarray], *, batch_size: int = 32, **decoding: Any) -> Iterator[dict]:
        """The decoded outputs of preprocessed images, which are run in batches of one size."""
        for batch in _batched(images, batch_size):
            rows = np.stack(batch)
            padded = np.concatenate([rows, np.zeros((batch_size - len(rows), *rows.shape[1:]), rows.dtype)])
            outputs = jax.tree.map(np.asarray, self.outputs(padded if len(rows) > 1 else rows))
            kept = jax.tree.map(lambda leaf: leaf[: len(rows)], outputs)  # noqa: B023
            yield from self._task.decode(kept, self._info, **decoding)


class DetectionPredictor:
    """A trained detector that takes images as they come, of any size that its canvases hold.

    predictor("a.jpg")            {"detections": [{"class", "category_id", "bbox", "score", "segmentation"}, ...]}
    predictor(["a.jpg", array])   a list of them; images are as for `Predictor`

    Boxes (x, y, width, height) and masks (RLE) are in pixels of the image given.

    Attributes:
        model: the detector, a Flax module, without preprocessing.
        variables: of the model, {"params": ..., ...}.
        labels: the names of the classes.
    """

    def __init__(self, trained: Trained) -> None:
        from halvit_jax import data

        data.hide_accelerators()
        self._task, self._info, fields = trained.task, trained.info, trained.config.instances
        self.model, self.variables, self.labels = trained.task.model, trained.model_variables, trained.info.class_names
        self.serving = trained.task.serving(self.variables, folded=False)
        self._apply = jax.jit(self.serving.apply)  # compiled once a canvas
        self._canvases = [tuple(canvas) for canvas in fields.canvases]
        self._sides = {"short_side": fields.short_side, "long_side": fields.long_side}

    def __call__(self, images: Image | Sequence[Image]) -> Any:
        """The detections in one image, or a list of them for a list.

        Raises:
            ValueError: an image that cannot be read or that no canvas holds, by name.
        """
        if isinstance(images, list | tuple):
            return [self(image) for image in images]
        return self.detect(self.preprocess(images))

    def preprocess(self, image: Image) -> dict[str, np.ndarray]:
        """The image on its canvas: `image` uint8 [h, w, 3], `size`, `original`, and `pixels`, the image given.

        Raises:
            ValueError: the image cannot be read, or no canvas holds it.
        """
        from halvit_jax import data

        if isinstance(image, str | os.PathLike):
            return data.read_on_canvas(os.path.expanduser(os.fspath(image)), self._canvases, **self._sides)
        if hasattr(image, "convert"):  # Pillow's
            image = np.asarray(image.convert("RGB"))
        return data.put_on_canvas(np.asarray(image), self._canvases, **self._sides)

    def detect(self, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The detections in a preprocessed image."""
        outputs = self._apply(self.serving.variables, *(row[name][None] for name in self.serving.inputs))
        outputs |= {name: row[name][None] for name in ("size", "original")}
        (decoded,) = self._task.decode(outputs, self._info)
        return decoded


def load_predictor(
    source: str | os.PathLike[str], *, step: int | str | None = None, image_size: int | None = None
) -> Predictor | DetectionPredictor:
    """The predictor of a workdir (its newest checkpoint, or that of `step`, which may be "best"), or of a .safetensors
    file of `halvit_jax.export` or `halvit_jax.halve`. It computes in float32.

    With `image_size` it takes images of another height and width; learned positions are resampled.

    Raises:
        ValueError: no run or no checkpoint in a workdir, or a file without a description of its images.
    """
    source = os.path.expanduser(os.fspath(source))
    is_workdir = not hub.is_source(source) and storage.parse(source).is_dir()
    weights = None if is_workdir else readers.read(source)
    if step is not None and weights is not None:
        raise ValueError(f"step={step!r} chooses a checkpoint of a workdir, and {source} is none")
    if weights is None or CONFIG in weights.metadata:
        return predictor_of(load_trained(source, step=step), image_size=image_size)
    found = weights_file.from_weights(weights)
    described = json.loads(weights.metadata.get("info", "{}"))
    if found is None or "classes" not in described:
        raise ValueError(
            f"{source} does not describe its images and classes; give a workdir, or a .safetensors file of "
            "halvit_jax.export"
        )
    fields, variables = found.fields | ({"image_size": image_size} if image_size else {}), found.variables
    task = Classification(create_model(found.name, **fields), mean=described["mean"], std=described["std"])
    if image_size:
        variables = fit(task, variables, found.name)
    how = {keyword: described[name] for name, keyword in PREPROCESSING.items() if name in described}
    return Predictor(task, variables, DatasetInfo(described["classes"], 0), how)


def predictor_of(trained: Trained, *, image_size: int | None = None) -> Predictor | DetectionPredictor:
    """The predictor of a trained model, which preprocesses as its evaluation did, for images of its or another size."""
    trained = at_size(trained, image_size) if image_size else trained
    if trained.config.task.name == "detection":
        return DetectionPredictor(trained)
    fields = trained.config.data
    how = {"fraction": fields.eval_crop, "method": fields.interpolation, "resize": fields.eval_resize}
    how["exif_rotation"] = fields.exif_rotation
    return Predictor(trained.task, trained.model_variables, trained.info, how)


def _batched(images: Iterable[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, ...]]:
    iterator = iter(images)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch
