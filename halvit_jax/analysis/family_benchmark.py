"""Benchmark of all families: a small model of each, trained on the embedded digits by one recipe.

`python -m halvit_jax.bench --what=families` calls `measure` and `plot`.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from halvit_jax.analysis.counts import counts_of
from halvit_jax.convert import weights_file
from halvit_jax.experiment import workdir as files
from halvit_jax.experiment.trained import abstract_checkpoint_state, load_trained
from halvit_jax.models import fold
from halvit_jax.recipes import digits
from halvit_jax.text import pip_install
from halvit_jax.training.sharding import bytes_of

Train = Callable[[ConfigDict, pathlib.Path], Any]  # trains a config in a workdir to the end, as `main` does

# label -> its model on digits. Models of one shape are adjacent, the baseline first.
RUNS: dict[str, Callable[[], ConfigDict]] = {
    "ViT": lambda: digits.vit("deit_small"),
    "HaLViT": lambda: digits.vit("halvit_tiny"),
    "ViT hc": lambda: digits.vit("deit_small_hc"),
    "HaLViT h": lambda: digits.vit("halvit_tiny_h"),
    "Mini-DeiT": lambda: digits.vit("mini_deit_tiny"),
    "Mini-HaLViT": lambda: digits.vit("mini_halvit_tiny"),
    "SHViT": digits.shvit,
    "Swin": lambda: digits.swin("swin_tiny"),
    "Mini-Swin": lambda: digits.mini_swin("mini_swin_tiny"),
    "PVT": lambda: digits.pvt("pvt_tiny"),
    "PVT hc": lambda: digits.pvt("pvt_tiny_hc"),
    "Next-ViT": lambda: digits.nextvit("nextvit_small"),
    "Next-ViT hc": lambda: digits.nextvit("nextvit_small_hc"),
}
OPTIONAL = ("HaLViT h", "Mini-HaLViT", "Swin", "Mini-Swin")  # measured only if named
DEFAULT = tuple(label for label in RUNS if label not in OPTIONAL)
STEPS_PER_EPOCH = 11  # of the digits, in batches of 128
WEIGHTS_FILE = "weights.safetensors"  # in each workdir: the folded model's, for its size


def validate_labels(labels: Sequence[str]) -> None:
    """Raise a ValueError unless all labels are of RUNS."""
    for label in labels:
        if label not in RUNS:
            raise ValueError(f"--families has {label!r}, which is not one of {', '.join(RUNS)}")


def recipe(label: str, *, steps: int, seed: int) -> ConfigDict:
    """The config of one run: the entry's model, with the same optimizer, schedule and augmentation for all."""
    config = RUNS[label]()
    config.seed = seed
    config.total_steps = config.loop.eval_every = config.loop.checkpoint_every = steps
    config.loop.log_every, config.loop.ema_decay = 100, 0.0
    config.optim.warmup_epochs = steps / STEPS_PER_EPOCH / 5
    return config


def measure(
    labels: Sequence[str], workdir: pathlib.Path, *, train: Train, seeds: int, steps: int, repeats: int
) -> list[dict[str, Any]]:
    """Size, latency and accuracy of each family, one row each.

    `params`, `bytes_on_disk` and `gmacs` are those of the folded (deployed) model; `top1` is the mean over the seeds,
    in percent, of the non-EMA weights. `latency_ms` is for one image; the families take turns. Runs are kept in
    `workdir`: finished ones are not repeated, the others are trained by `train`.
    """
    rows, inference_fns = [], {}
    for label in labels:
        runs = [_trained(recipe(label, steps=steps, seed=seed), workdir, label, train) for seed in range(seeds)]
        top1 = [100 * result["eval"]["top1"] for _, result in runs]
        folder, result = runs[0]
        row, inference_fns[label] = _measure_size(folder)
        rows.append({"family": label, "trained_params": result["params"], **row})
        rows[-1] |= {"top1": round(statistics.mean(top1), 2), "top1_of_seeds": [round(each, 2) for each in top1]}
    for row, latency in zip(rows, _latencies(list(inference_fns.values()), repeats), strict=True):
        row["latency_ms"] = round(1e3 * latency, 3)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    columns = "{:<12} {:>10} {:>10} {:>14} {:>8} {:>11} {:>7}  {}"
    lines = [
        columns.format("family", "parameters", "disk KiB", "optimizer KiB", "MMACs", "latency ms", "top-1", "seeds")
    ]
    for row in rows:
        kibibytes = [f"{row[key] / 2**10:,.0f}" for key in ("bytes_on_disk", "optimizer_bytes")]
        speeds = f"{1e3 * row['gmacs']:.2f}", f"{row['latency_ms']:.2f}", f"{row['top1']:.2f}"
        seeds = ", ".join(f"{each:.2f}" for each in row["top1_of_seeds"])
        lines.append(columns.format(row["family"], f"{row['params']:,}", *kibibytes, *speeds, seeds))
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """A PNG of accuracy against parameters, with a bar from the worst seed to the best.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib import figure
    except ImportError as error:
        raise ValueError(f"the plot needs matplotlib: {pip_install('plot')}") from error
    chart = figure.Figure(figsize=(8, 5), layout="constrained")  # without pyplot's windows and state
    axes = chart.subplots()
    for number, row in enumerate(sorted(rows, key=lambda row: row["params"])):
        low, high = min(row["top1_of_seeds"]), max(row["top1_of_seeds"])
        bar = [[row["top1"] - low], [high - row["top1"]]]
        axes.errorbar(row["params"] / 1e3, row["top1"], yerr=bar, fmt="o", capsize=3)
        side, offset = ("left", 6) if number % 2 else ("right", -6)  # names of neighbours on opposite sides
        point = {"xy": (row["params"] / 1e3, row["top1"]), "xytext": (offset, 4), "textcoords": "offset points"}
        axes.annotate(row["family"], **point, ha=side)
    axes.set_xlabel("parameters of the deployed model, thousands")
    axes.set_ylabel("top-1 on the test digits, %")
    axes.grid(alpha=0.3)
    axes.margins(0.2, 0.15)  # space for the names
    chart.savefig(path, dpi=120)


def _trained(
    config: ConfigDict, workdir: pathlib.Path, label: str, train: Train
) -> tuple[pathlib.Path, dict[str, Any]]:
    """The workdir and result of a run, which is trained unless it is finished."""
    name = label.lower().replace(" ", "_").replace("-", "_")
    folder = workdir / f"{name}_{config.total_steps}_{config.seed}"
    result = folder / files.RESULT_FILE
    if not result.is_file():
        train(config, folder)
    return folder, json.loads(result.read_text())


def _measure_size(folder: pathlib.Path) -> tuple[dict[str, Any], Callable[[], None]]:
    """The size of a run's model, and a function that classifies one image."""
    trained = load_trained(folder)
    state = abstract_checkpoint_state(trained.task, trained.config)
    model, variables = fold(trained.task.model, trained.model_variables)
    fields = {**trained.config.model, "folded": True} if model is not trained.task.model else trained.config.model
    name, weights = fields["name"], folder / WEIGHTS_FILE
    weights_file.save(weights, name, variables, **{field: value for field, value in fields.items() if field != "name"})
    image = jnp.zeros((1, model.image_size, model.image_size, model.in_channels))
    infer = jax.jit(lambda v, x: model.apply(v, x, train=False)).lower(variables, image).compile()
    variables = jax.device_put(variables)
    counts = counts_of(model)
    row = {
        "params": counts.params,
        "bytes_on_disk": weights.stat().st_size,
        "optimizer_bytes": bytes_of(state.opt_state),
        "gmacs": counts.macs / 1e9,
    }
    return row, lambda: jax.block_until_ready(infer(variables, image))


def _latencies(inference_fns: Sequence[Callable[[], None]], repeats: int, *, calls: int = 50) -> list[float]:
    """Seconds of a call of each function: the median over rounds in which all take turns, after a warm-up round."""
    times: list[list[float]] = [[] for _ in inference_fns]
    for round_number in range(repeats + 1):
        for infer, found in zip(inference_fns, times, strict=True):
            started = time.perf_counter()
            for _ in range(calls):
                infer()
            if round_number:
                found.append((time.perf_counter() - started) / calls)
    return [statistics.median(found) for found in times]
