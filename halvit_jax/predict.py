"""Classify images, find objects in them, or apply the model of any other task to them.

python -m halvit_jax.predict --workdir=DIR [--attention=out.png] [--draw=FOLDER] IMAGE...

One JSON object a line: {"image": path, "top5": [{"class": name, "probability": p}, ...]} (of another task, its decoded
output), or, for a file that is not an image, {"image": path, "error": reason}, and the exit code 1. `--attention`
draws the attention of a transformer's last block: a row for each image, without and with the attention as an overlay
from blue (least) to red (most). `--draw` writes every image with its detections into a folder.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from halvit_jax.cli import app
from halvit_jax.protocols import ExitCode, ServingModel

MIN_SIDE = 224  # pixels of a drawn image


def define_flags() -> None:
    """Define the command-line flags."""
    flags.DEFINE_string("workdir", None, "The workdir of a run of halvit_jax.main.")
    flags.DEFINE_string("draw", None, "A folder for the images with their detections.")
    flags.DEFINE_string("attention", None, "A PNG file for a drawing of the attention of the last block.")


def main(argv: list[str]) -> None:
    """Print a line for every image; exit with 1 if one of them could not be read."""
    with app.report_user_errors():
        if flags.FLAGS.workdir is None or not argv[1:]:
            raise ValueError("give --workdir=DIR and at least one image")
        picture = flags.FLAGS.attention
        folder = flags.FLAGS.draw
        if picture is not None and not picture.endswith(".png"):
            raise ValueError(f"--attention={picture} must end in .png")
        from halvit_jax.experiment.trained import load_trained

        trained = load_trained(flags.FLAGS.workdir)
        if folder is not None:
            from halvit_jax.cli import drawing

            drawing.check(trained.config.task.name, folder, argv[1:])
        if picture is not None:
            serving = trained.task.serving(trained.model_variables, folded=False)
            image = jax.ShapeDtypeStruct((1, *serving.input_size, 3), "uint8")
            jax.eval_shape(lambda images: _last_maps(serving, images), image)

    failed, drawn = False, []
    for row, image in predict(trained, argv[1:]):
        failed |= image is None
        if folder is not None and image is not None:
            drawing.draw(image, row["detections"], drawing.file_of(folder, row["image"]))
        print(json.dumps(row), flush=True)
        if picture is not None and image is not None:
            drawn.append(attention_over(serving, image))
    if drawn:
        from halvit_jax import data

        with app.report_user_errors():
            data.write_png(picture, np.concatenate(drawn))
    if failed:
        sys.exit(ExitCode.PARTLY)


def predict(trained: Any, paths: list[str]) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
    """For each image file the decoded output of the model, or the reason why there is none; and the image.

    The image is as the model gets it, or, for a detector, that of the file.
    """
    serving = trained.task.serving(trained.model_variables, folded=False)
    read, apply = _reader(trained.config, serving), jax.jit(serving.apply)
    for path in paths:
        try:
            row = read(path)
        except ValueError as error:
            yield {"image": path, "error": str(error)}, None
            continue
        outputs = apply(serving.variables, *(row[name][None] for name in serving.inputs))
        if "original" in row:
            outputs |= {name: row[name][None] for name in ("size", "original")}
        (decoded,) = trained.task.decode(outputs, trained.info)
        yield {"image": path, **decoded}, row.get("pixels", row["image"])


def _reader(config: Any, serving: ServingModel) -> Callable[[str], dict[str, np.ndarray]]:
    """A function of a path: what an evaluation would read of this image."""
    from halvit_jax import data

    if config.task.name == "detection":
        fields = config.instances
        sides = {"short_side": fields.short_side, "long_side": fields.long_side}
        canvases = [tuple(canvas) for canvas in fields.canvases]
        return lambda path: data.read_on_canvas(path, canvases, **sides)
    fields = config.data
    how = {"fraction": fields.eval_crop, "method": fields.interpolation, "resize": fields.eval_resize}
    transform = data.eval_transform(serving.input_size, **how)
    return lambda path: {"image": data.read_image(path, transform)}


def attention_over(serving: ServingModel, image: np.ndarray) -> np.ndarray:
    """An image [s, s, 3] and, to its right, its overlay with the attention of the last block: [t, 2 t, 3], uint8.

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
    both = np.concatenate([image, np.uint8(0.5 * image + 0.5 * 255 * colours.clip(0, 1))], 1)
    enlarge = -(-MIN_SIDE // size)
    return both.repeat(enlarge, 0).repeat(enlarge, 1)


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
