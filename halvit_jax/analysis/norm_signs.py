"""Whether a HaLViT learns faster if its feed-forward layers may contract from the start.

`python -m halvit_jax.bench --what=signs` calls `measure` and `table`. With positive scales of the norm before it the
Jacobian of a tied feed-forward layer is positive semidefinite nearly everywhere (see `halving.ffn`). Here half or all
of these scales start at -1. The runs of a seed start from the same values but for the signs.
"""

import json
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from halvit_jax.convert import weights_file
from halvit_jax.experiment import workdir as files
from halvit_jax.experiment.tasks import build_task
from halvit_jax.recipes import digits
from halvit_jax.trees import map_paths

Train = Callable[[ConfigDict, pathlib.Path], Any]  # trains a config in a workdir to the end, as `main` does

SEEDS, STEPS = 5, 440
STEPS_PER_EPOCH, WARMUP = 11, 1 / 8  # of the digits in batches of 128; of a run
# Row -> the model, and the signs of a feed-forward norm's channels.
ROWS: dict[str, tuple[str, Callable[[int], np.ndarray]]] = {
    "untied": ("deit_small", np.ones),
    "tied": ("halvit_tiny", np.ones),
    "tied, half at -1": ("halvit_tiny", lambda width: np.where(np.arange(width) % 2, 1.0, -1.0)),
    "tied, all at -1": ("halvit_tiny", lambda width: -np.ones(width)),
}


def recipe(row: str, *, steps: int, seed: int, start: pathlib.Path) -> ConfigDict:
    """The config of a run that starts from the weight file `start`."""
    config = digits.vit(ROWS[row][0])
    config.seed, config.init_from = seed, str(start)
    config.total_steps = config.loop.eval_every = config.loop.checkpoint_every = steps
    config.loop.log_every, config.loop.ema_decay = 100, 0.0
    config.optim.warmup_epochs = steps * WARMUP / STEPS_PER_EPOCH
    return config


def write_start(row: str, config: ConfigDict) -> None:
    """Write the weight file that a run starts from."""
    model, signs = build_task(config).model, ROWS[row][1]
    images = jnp.zeros((1, model.image_size, model.image_size, model.in_channels))
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(config.seed))

    def signed(path: str, leaf: jax.Array) -> np.ndarray:
        sign = signs(len(leaf)).astype(np.float32) if path.endswith("ffn_norm/scale") else np.float32(1)
        return np.asarray(leaf) * sign

    fields = {field: value for field, value in config.model.items() if value is not None}
    weights_file.save(config.init_from, fields.pop("name"), map_paths(signed, variables), **fields)


def measure(workdir: pathlib.Path, *, train: Train, seeds: int = SEEDS, steps: int = STEPS) -> list[dict[str, Any]]:
    """One row for each of ROWS: {"row", "top1" (percent, the mean), "deviation", "top1_of_seeds"}.

    Runs are kept in `workdir`; finished ones are not repeated.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    top1: dict[str, list[float]] = {row: [] for row in ROWS}
    for seed in range(seeds):
        for row, found in top1.items():
            name = row.replace(", ", "_").replace(" ", "_")
            folder, start = workdir / f"{name}_{steps}_{seed}", workdir / f"{name}_{seed}.safetensors"
            if not (folder / files.RESULT_FILE).is_file():
                config = recipe(row, steps=steps, seed=seed, start=start)
                write_start(row, config)
                train(config, folder)
            found.append(100 * json.loads((folder / files.RESULT_FILE).read_text())["eval"]["top1"])
    return [
        {
            "row": row,
            "top1": round(statistics.mean(found), 2),
            "deviation": round(statistics.stdev(found), 2) if len(found) > 1 else 0.0,
            "top1_of_seeds": [round(each, 2) for each in found],
        }
        for row, found in top1.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    columns = "{:<18} {:>7} {:>10}  {}"
    lines = [columns.format("scales of the norms", "top-1", "deviation", "of the seeds")]
    for row in rows:
        seeds = ", ".join(f"{each:.2f}" for each in row["top1_of_seeds"])
        lines.append(columns.format(row["row"], f"{row['top1']:.2f}", f"{row['deviation']:.2f}", seeds))
    return "\n".join(lines)
