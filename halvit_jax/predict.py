"""Name what is on images, with the model of a run.

python -m halvit_jax.predict --workdir=DIR IMAGE...

One JSON object a line: {"image": path, "top5": [{"class": name, "probability": p}, ...]}, or, for a file that is no
image, {"image": path, "error": why}; then the exit code is 1.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from halvit_jax import door

TOP = 5


def define_flags() -> None:
    """The flags of this door."""
    flags.DEFINE_string("workdir", None, "The workdir of a run of halvit_jax.main.")


def main(argv: list[str]) -> None:
    """Print a line for every image; exit with 1 if one of them could not be read."""
    with door.bad_input():
        if flags.FLAGS.workdir is None or not argv[1:]:
            raise ValueError("give --workdir=DIR and at least one image")
        from halvit_jax.run import load_trained

        trained = load_trained(flags.FLAGS.workdir)

    failed = False
    for row in predict(trained, argv[1:]):
        failed |= "error" in row
        print(json.dumps(row), flush=True)
    if failed:
        sys.exit(1)


def predict(trained: Any, paths: list[str]) -> Iterator[dict[str, Any]]:
    """For each image file the classes of highest probability, or the reason why there are none."""
    from halvit_jax import data

    config, task = trained.config, trained.task
    size, share, method = task.model.image_size, config.data.eval_crop, config.data.interpolation
    apply = jax.jit(lambda image: jax.nn.softmax(task.predict(*trained.variables, {"image": image})[0]))
    for path in paths:
        try:
            image = data.read_image(path, data.eval_transform(size, share=share, method=method))
        except ValueError as error:
            yield {"image": path, "error": str(error)}
            continue
        probabilities = np.asarray(apply(image[None]))
        best = np.argsort(-probabilities, kind="stable")[:TOP]
        top5 = [{"class": trained.class_names[i], "probability": round(float(probabilities[i]), 6)} for i in best]
        yield {"image": path, "top5": top5}


if __name__ == "__main__":
    define_flags()
    door.run(main)
