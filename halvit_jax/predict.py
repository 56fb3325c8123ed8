"""Name what is on images, with the model of a run.

python -m halvit_jax.predict --workdir=DIR [--attention=out.png] IMAGE...

One JSON object a line: {"image": path, "top5": [{"class": name, "probability": p}, ...]}, or, for a file that is no
image, {"image": path, "error": why}; then the exit code is 1. `--attention` draws what a transformer's last block looks
at: a row for each image, as the model sees it and with the attention over it, red being most.
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
from halvit_jax.models.intermediates import capture

TOP = 5
DRAWN = 224  # pixels


def define_flags() -> None:
    """The flags of this door."""
    flags.DEFINE_string("workdir", None, "The workdir of a run of halvit_jax.main.")
    flags.DEFINE_string("attention", None, "A PNG file to draw the attention of the last block into.")


def main(argv: list[str]) -> None:
    """Print a line for every image; exit with 1 if one of them could not be read."""
    with app.bad_input():
        if flags.FLAGS.workdir is None or not argv[1:]:
            raise ValueError("give --workdir=DIR and at least one image")
        picture = flags.FLAGS.attention
        if picture is not None and not picture.endswith(".png"):
            raise ValueError(f"--attention={picture} must end in .png")
        from halvit_jax.experiment.trained import load_trained

        trained = load_trained(flags.FLAGS.workdir)
        if picture is not None:
            shape = (1, *(trained.task.model.image_size,) * 2, 3)
            jax.eval_shape(lambda images: _last_maps(trained, images), jax.ShapeDtypeStruct(shape, "uint8"))

    failed, drawn = False, []
    for row, image in predict(trained, argv[1:]):
        failed |= image is None
        print(json.dumps(row), flush=True)
        if picture is not None and image is not None:
            drawn.append(attention_over(trained, image))
    if drawn:
        from halvit_jax import data

        with app.bad_input():
            data.write_png(picture, np.concatenate(drawn))
    if failed:
        sys.exit(1)


def predict(trained: Any, paths: list[str]) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
    """For each image file the classes of highest probability, or the reason why there are none; and the image."""
    from halvit_jax import data

    config, task = trained.config, trained.task
    fields, size = config.data, task.model.image_size
    transform = data.eval_transform((size, size), fraction=fields.eval_crop, method=fields.interpolation)
    apply = jax.jit(lambda image: jax.nn.softmax(task.predict(*trained.variables, {"image": image})[0]))
    for path in paths:
        try:
            image = data.read_image(path, transform)
        except ValueError as error:
            yield {"image": path, "error": str(error)}, None
            continue
        probabilities = np.asarray(apply(image[None]))
        best = np.argsort(-probabilities, kind="stable")[:TOP]
        top5 = [{"class": trained.class_names[i], "probability": round(float(probabilities[i]), 6)} for i in best]
        yield {"image": path, "top5": top5}, image


def attention_over(trained: Any, image: np.ndarray) -> np.ndarray:
    """An image [s, s, 3] as it is and, right of it, under the attention of the last block: [t, 2 t, 3], uint8.

    It is that of the class token, or where there is none of all tokens, averaged over the heads; the least of the image
    is blue, the most red. Both are enlarged by a whole number to at least `DRAWN` pixels.

    Raises:
        ValueError: the model has no attention maps, or its last block none of the whole image.
    """
    weights = np.asarray(_last_maps(trained, image[None])[0].mean(0))  # [n, m]
    side = math.isqrt(weights.shape[1])
    before = weights.shape[1] - side**2  # tokens that stand before those of the image
    seen = (weights[0] if before else weights.mean(0))[before:].reshape(side, side)
    heat = (seen - seen.min()) / max(np.ptp(seen), 1e-12)
    size = image.shape[0]
    heat = np.asarray(jax.image.resize(heat, (size, size), "linear"))[..., None]
    colours = np.concatenate([heat, 1 - abs(2 * heat - 1), 1 - heat], -1)
    both = np.concatenate([image, np.uint8(0.5 * image + 0.5 * 255 * colours.clip(0, 1))], 1)
    enlarge = -(-DRAWN // size)
    return both.repeat(enlarge, 0).repeat(enlarge, 1)


def _last_maps(trained: Any, images: jax.Array) -> jax.Array:
    """The attention of the last block, [b, h, n, m]; of m keys where they are fewer than the n tokens (PVTv2)."""
    maps = capture(trained.task.model, trained.model_variables, trained.task.normalise(images))["attention"]
    last = list(maps.values())[-1]
    if len(last) > len(images):
        raise ValueError(
            f"the last block of {type(trained.task.model).__name__} attends in windows, not over the image"
        )
    return last


if __name__ == "__main__":
    define_flags()
    app.run(main)
