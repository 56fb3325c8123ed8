"""Classify images, find objects in them, or apply the model of any other task to them.

python -m halvit_jax.predict --workdir=DIR [--step=best] [--image_size=N] [--top=3] [--csv=out.csv]
    [--attention=out.png] [--draw=FOLDER] IMAGE...

One JSON object a line: {"image": path, "top5": [{"class": name, "probability": p}, ...]} (of another task, its decoded
output), or, for a file that is not an image, {"image": path, "error": reason}, and the exit code 1. `--attention`
draws the attention of a transformer's last block: a row for each image, without and with the attention as an overlay
from blue (least) to red (most). `--draw` writes every image with its detections into a folder. An IMAGE may be a
folder, which stands for all images in it and below, or a pattern such as "photos/**/*.jpg". `--csv` writes a table
too, with a line for each image: the classes from the most probable on, each with its probability.
"""

import csv
import glob
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import flags

from halvit_jax import storage
from halvit_jax.cli import app
from halvit_jax.protocols import ExitCode, ServingModel

if TYPE_CHECKING:
    from halvit_jax.experiment.predictor import DetectionPredictor, Predictor

BATCH = 16  # images that are run at once
MIN_SIDE = 224  # pixels of a drawn image


def define_flags() -> None:
    """Define the command-line flags."""
    flags.DEFINE_string("workdir", None, "The workdir of a run of halvit_jax.main.")
    flags.DEFINE_string("step", None, "The step whose checkpoint to use, or best; else the newest.")
    flags.DEFINE_integer("top", None, "How many classes to list; else 5.")
    flags.DEFINE_integer("image_size", None, "Height and width of the images, if they are not those of the training.")
    flags.DEFINE_string("csv", None, "A CSV file for the classes of every image.")
    flags.DEFINE_string("draw", None, "A folder for the images with their detections.")
    flags.DEFINE_string("attention", None, "A PNG file for a drawing of the attention of the last block.")


def main(argv: list[str]) -> None:
    """Print a line for every image; exit with 1 if one of them could not be read."""
    with app.report_user_errors():
        if flags.FLAGS.workdir is None or not argv[1:]:
            raise ValueError("give --workdir=DIR and at least one image or folder")
        picture = flags.FLAGS.attention
        if picture is not None and not picture.endswith(".png"):
            raise ValueError(f"--attention={picture} must end in .png")
        if flags.FLAGS.top is not None and flags.FLAGS.top < 1:
            raise ValueError(f"--top={flags.FLAGS.top} must be at least 1")
        if flags.FLAGS.image_size is not None and flags.FLAGS.image_size < 1:
            raise ValueError(f"--image_size={flags.FLAGS.image_size} must be at least 1")
        if flags.FLAGS.csv is not None and not os.path.isdir(os.path.dirname(os.path.abspath(flags.FLAGS.csv))):
            raise ValueError(f"--csv={flags.FLAGS.csv} is in a folder that does not exist; create it")
        serving, rows = _predictions(argv[1:])
        if picture is not None:
            image = jax.ShapeDtypeStruct((1, *serving.input_size, serving.channels), "uint8")
            jax.eval_shape(lambda images: _last_maps(serving, images), image)

    failed, drawn, table = False, [], []
    for row, image in rows:
        failed |= image is None
        table.append(_csv_row(row))
        if flags.FLAGS.draw is not None and image is not None:
            from halvit_jax.cli import drawing

            drawing.draw(image, row["detections"], drawing.file_of(flags.FLAGS.draw, row["image"]))
        print(json.dumps(row, ensure_ascii=False), flush=True)
        if picture is not None and image is not None:
            drawn.append(attention_over(serving, image))
    if flags.FLAGS.csv is not None:
        with app.report_user_errors(), open(flags.FLAGS.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, sorted({name: None for row in table for name in row}, key=_column))
            writer.writeheader()
            writer.writerows(table)
    if drawn:
        from halvit_jax import data

        with app.report_user_errors():
            data.write_png(picture, np.concatenate(drawn))
    if failed:
        sys.exit(ExitCode.PARTLY)


def refuse_flags(given: Mapping[str, Any]) -> None:
    """Raise a ValueError for a flag of classification that is given with a detector."""
    for flag, value in given.items():
        if value is not None:
            raise ValueError(f"--{flag}={value} is for classification, and this run has task.name='detection'")


def predict(
    predictor: "Predictor", paths: Iterable[str], **decoding: Any
) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
    """For each image file the decoded output of the model, or the reason why there is none; and the image."""
    iterator = iter(paths)
    while chunk := list(itertools.islice(iterator, BATCH)):
        images: list[np.ndarray | str] = []
        for path in chunk:
            try:
                images.append(predictor.preprocess(path))
            except ValueError as error:
                images.append(str(error))
        good = [image for image in images if not isinstance(image, str)]
        rows = predictor.decoded(good, batch_size=BATCH, **decoding)
        for path, image in zip(chunk, images, strict=True):
            if isinstance(image, str):
                yield {"image": path, "error": image}, None
            else:
                yield {"image": path, **next(rows)}, image


def detect(predictor: "DetectionPredictor", paths: Iterable[str]) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
    """`predict` for a detector: the detections in the pixels of each file; and the file's image."""
    for path in paths:
        try:
            row = predictor.preprocess(path)
        except ValueError as error:
            yield {"image": path, "error": str(error)}, None
            continue
        yield {"image": path, **predictor.detect(row)}, row["pixels"]


def attention_over(serving: ServingModel, image: np.ndarray) -> np.ndarray:
    """An image [s, s, c] and, to its right, its overlay with the attention of the last block: [t, 2 t, 3], uint8.

    The attention is that of the class token, or of all tokens without one, averaged over the heads, from
    blue (least) to red (most). Both are enlarged by a whole number to at least `MIN_SIDE` pixels.

    Raises:
        ValueError: the model has no attention maps, or those of its last block cover windows only.
    """
    weights = np.asarray(_last_maps(serving, image[None])[0].mean(0))  # [n, m]
    side = math.isqrt(weights.shape[1])
    before = weights.shape[1] - side**2  # tokens before those of the image
    seen = (weights[0] if before else weights.mean(0))[before:].reshape(side, side)
    heat = (seen - seen.min()) / max(np.ptp(seen), 1e-12)
    size = image.shape[0]
    heat = np.asarray(jax.image.resize(heat, (size, size), "linear"))[..., None]
    colours = np.concatenate([heat, 1 - abs(2 * heat - 1), 1 - heat], -1)
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    both = np.concatenate([image, np.uint8(0.5 * image + 0.5 * 255 * colours.clip(0, 1))], 1)
    enlarge = -(-MIN_SIDE // size)
    return both.repeat(enlarge, 0).repeat(enlarge, 1)


def _predictions(arguments: list[str]) -> tuple[ServingModel, Iterator[tuple[dict[str, Any], np.ndarray | None]]]:
    """The model, and the rows of `predict` or `detect`, which are made one after the other."""
    from halvit_jax.cli import drawing
    from halvit_jax.experiment.predictor import DetectionPredictor, load_predictor
    from halvit_jax.experiment.workdir import parse_step

    workdir, step = storage.parse(flags.FLAGS.workdir, "--workdir="), parse_step(flags.FLAGS.step)
    if not workdir.exists():
        raise ValueError(f"{workdir} is not the workdir of a run, nor a weight file: it does not exist")
    paths = _files(arguments)
    predictor = load_predictor(workdir, step=step, image_size=flags.FLAGS.image_size)
    detects = isinstance(predictor, DetectionPredictor)
    if flags.FLAGS.draw is not None:
        drawing.check(detects, flags.FLAGS.draw, paths)
    if detects:
        refuse_flags({flag: flags.FLAGS[flag].value for flag in ("top", "csv")})
        return predictor.serving, detect(predictor, paths)
    decoding = {} if flags.FLAGS.top is None else {"top": flags.FLAGS.top}
    return predictor.serving, predict(predictor, paths, **decoding)


def _files(arguments: list[str]) -> list[str]:
    """The image files that the command line names; a folder stands for all images in it and below."""
    from halvit_jax import data

    files = []
    for argument in map(os.path.expanduser, arguments):
        pattern = glob.has_magic(argument) and not os.path.exists(argument)
        found = [path for path in sorted(glob.glob(argument, recursive=True)) if os.path.isfile(path)]
        if not pattern:
            found = data.image_files(argument) if os.path.isdir(argument) else [argument]
        if not found:
            raise ValueError(f"{argument} {'matches no file' if pattern else 'holds no images'}")
        files += found
    return files


def _csv_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a table for an image: image, class1, probability1, class2, ..., or error."""
    flat = {name: value for name, value in row.items() if isinstance(value, str | int | float)}
    for name, value in row.items():
        if name.startswith("top") and isinstance(value, list):
            for place, entry in enumerate(value, start=1):
                flat |= {f"class{place}": entry["class"], f"probability{place}": entry["probability"]}
    return flat


def _column(name: str) -> tuple[bool, bool, int, str]:
    """The order of the columns: the image, the classes by their place, what else there is, the error."""
    place = int("".join(filter(str.isdigit, name)) or 0)
    return name == "error", name != "image", place, name


def _last_maps(serving: ServingModel, images: jax.Array) -> jax.Array:
    """The attention of the last block, [b, h, n, m]; m < n keys if the model reduces them (PVTv2)."""
    if serving.capture is None:
        raise ValueError("--attention: this task's model has no attention maps")
    last = list(serving.capture(serving.variables, images)["attention"].values())[-1]
    if len(last) > len(images):
        raise ValueError("--attention: the last block of this model attends in windows, not over the image")
    return last


if __name__ == "__main__":
    define_flags()
    app.run(main)
