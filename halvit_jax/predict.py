"""Classify images, or apply the model of any other task to them.

python -m halvit_jax.predict --workdir=DIR [--attention=out.png] IMAGE...

One JSON object a line: {"image": path, "top5": [{"class": name, "probability": p}, ...]} (of another task, its decoded
output), or, for a file that is not an image, {"image": path, "error": reason}, and the exit code 1. `--attention`
draws the attention of a transformer's last block: a row for each image, without and with the attention as an overlay
from blue (least) to red (most).
"""

import json
import math
import sys
from collections.abc import Iterator
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
    flags.DEFINE_string("step", None, "The step whose checkpoint to use, or best; else the newest.")
    flags.DEFINE_string("attention", None, "A PNG file for a drawing of the attention of the last block.")


def main(argv: list[str]) -> None:
    """Print a line for every image; exit with 1 if one of them could not be read."""
    with app.report_user_errors():
        if flags.FLAGS.workdir is None or not argv[1:]:
            raise ValueError("give --workdir=DIR and at least one image")
        picture = flags.FLAGS.attention
        if picture is not None and not picture.endswith(".png"):
            raise ValueError(f"--attention={picture} must end in .png")
        from halvit_jax.experiment.trained import load_trained
        from halvit_jax.experiment.workdir import parse_step

        trained = load_trained(flags.FLAGS.workdir, step=parse_step(flags.FLAGS.step))
        if picture is not None:
            serving = trained.task.serving(trained.model_variables, folded=False)
            image = jax.ShapeDtypeStruct((1, *serving.input_size, 3), "uint8")
            jax.eval_shape(lambda images: _last_maps(serving, images), image)

    failed, drawn = False, []
    for row, image in predict(trained, argv[1:]):
        failed |= image is None
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
    """For each image file the decoded output of the model, or the reason why there is none; and the image."""
    from halvit_jax import data

    serving = trained.task.serving(trained.model_variables, folded=False)
    fields = trained.config.data
    how = {"fraction": fields.eval_crop, "method": fields.interpolation, "resize": fields.eval_resize}
    how["exif_rotation"] = fields.exif_rotation
    transform = data.eval_transform(serving.input_size, **how)
    apply = jax.jit(serving.apply)
    for path in paths:
        try:
            image = data.read_image(path, transform)
        except ValueError as error:
            yield {"image": path, "error": str(error)}, None
            continue
        (decoded,) = trained.task.decode(apply(serving.variables, image[None]), trained.info)
        yield {"image": path, **decoded}, image


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
