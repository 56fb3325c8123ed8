"""Benchmark of halving on the embedded digits: accuracy against steps, beside other students of the same shape.

`python -m halvit_jax.bench --what=halve` calls `measure`, `table` and `plot`. The teacher is README's untied ViT, of
docs/distillation.md. A cell is a run of `main` in a folder of its own; finished ones are not repeated, others resume.
"""

import json
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from halvit_jax.analysis.counts import counts_of
from halvit_jax.experiment import workdir as files
from halvit_jax.experiment.tasks import build_task
from halvit_jax.recipes import digits
from halvit_jax.text import pip_install

Train = Callable[[ConfigDict, pathlib.Path], Any]  # trains a config in a workdir to the end, as `main` does
Halve = Callable[[ConfigDict, pathlib.Path], dict[str, Any]]  # writes a weight file, as `experiment.halve.run`

STEPS = (50, 100, 200, 440)
TEACHER_STEPS = 2200
STEPS_PER_EPOCH = 11  # of the digits, in batches of 128
WARMUP = 1 / 8  # of a run
IMAGES, FIT_STEPS, FIT_TOKENS = 2048, 1500, 512  # of a halving
TIED = {"attention": {"ffn": "dense"}, "both": {}}  # what is tied -> fields of the student
# Row -> the task's recipe, whether it starts from the halved teacher, and the peak learning rate.
ROWS: dict[str, tuple[Callable[[], ConfigDict], bool, float]] = {
    "scratch, labels": (lambda: digits.vit("halvit_tiny"), False, 3e-3),
    "scratch, distilled": (lambda: digits.distilled("halvit_tiny", "soft"), False, 3e-3),
    "halved, labels": (lambda: digits.vit("halvit_tiny"), True, 1e-3),
    "halved, distilled": (lambda: digits.distilled("halvit_tiny", "soft"), True, 1e-3),
}


def teacher_config() -> ConfigDict:
    """The run of the teacher."""
    config = digits.vit("deit_small")
    config.total_steps = TEACHER_STEPS
    config.loop.eval_every = config.loop.checkpoint_every = TEACHER_STEPS // 4
    return config


def recipe(row: str, *, steps: int, seed: int, teacher: pathlib.Path, halved: pathlib.Path) -> ConfigDict:
    """The config of a cell; without weight averaging, as all figures of the table."""
    make, starts_halved, learning_rate = ROWS[row]
    config = make()
    if config.teacher.init_from:
        config.teacher.init_from = str(teacher)
    config.init_from = str(halved) if starts_halved else ""
    config.seed = seed
    config.total_steps = config.loop.eval_every = config.loop.checkpoint_every = steps
    config.loop.log_every, config.loop.ema_decay = 50, 0.0
    config.optim.learning_rate, config.optim.warmup_epochs = learning_rate, steps * WARMUP / STEPS_PER_EPOCH
    return config


def measure(
    workdir: pathlib.Path, *, train: Train, halve: Halve, seeds: int, steps: Sequence[int] = STEPS
) -> list[dict[str, Any]]:
    """One row for the teacher, for each kind of tying without training, and for each of ROWS and number of steps.

    Rows have "row", "steps", "top1" (percent, the mean over the seeds), "top1_of_seeds", and "soft_steps", the work
    after the teacher's training in steps of distillation from scratch.
    """
    teacher = workdir / "teacher"
    if not (teacher / files.RESULT_FILE).is_file():
        train(teacher_config(), teacher)
    untrained: dict[str, list[dict[str, Any]]] = {kind: [] for kind in TIED}
    top1: dict[tuple[str, int], list[float]] = {}
    for seed in range(seeds):  # all rows of a seed before the next
        for kind, found in untrained.items():
            path = workdir / f"halved_{kind}_{seed}.safetensors"  # at last that of both, from which the rows start
            config = recipe("halved, distilled", steps=1, seed=seed, teacher=teacher, halved=path)
            config.model.update(TIED[kind])
            found.append(_halved(config, path, halve))
        for row in ROWS:
            for length in steps:
                config = recipe(row, steps=length, seed=seed, teacher=teacher, halved=path)
                folder = workdir / f"{row.replace(', ', '_')}_{length}_{seed}"
                top1.setdefault((row, length), []).append(_trained(config, folder, train))
    rows = [_row("teacher", 0, [untrained["both"][0]["top1_before"]], 0.0)]
    for kind, found in untrained.items():
        work = _halving_work(fit=kind == "both")
        rows.append(_row(f"halved, {kind} tied", 0, [each["top1_after"] for each in found], work))
    for (row, length), found in top1.items():
        rows.append(_row(row, length, found, _training_work(row, length)))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    columns = "{:<24} {:>5} {:>7}  {:<26} {:>22}"
    lines = [columns.format("student", "steps", "top-1", "of the seeds", "work in soft steps")]
    for row in rows:
        seeds = ", ".join(f"{each:.2f}" for each in row["top1_of_seeds"])
        lines.append(columns.format(row["row"], row["steps"], f"{row['top1']:.2f}", seeds, f"{row['soft_steps']:.0f}"))
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """A picture of accuracy against steps, with a bar from the worst seed to the best.

    Raises:
        ValueError: matplotlib is not installed, or the path's suffix is unknown to it.
    """
    try:
        from matplotlib import figure
    except ImportError as error:
        raise ValueError(f"the plot needs matplotlib: {pip_install('plot')}") from error
    chart = figure.Figure(figsize=(8, 5), layout="constrained")  # without pyplot's windows and state
    axes = chart.subplots()
    untrained = {"halved, labels": rows[2], "halved, distilled": rows[2]}  # both start from it
    for name in dict.fromkeys(row["row"] for row in rows[3:]):
        points = [untrained[name]] if name in untrained else []
        points += [row for row in rows if row["row"] == name]
        low = [row["top1"] - min(row["top1_of_seeds"]) for row in points]
        high = [max(row["top1_of_seeds"]) - row["top1"] for row in points]
        steps, top1 = [row["steps"] for row in points], [row["top1"] for row in points]
        axes.errorbar(steps, top1, yerr=[low, high], fmt="o-", capsize=3, label=name)
    axes.axhline(rows[0]["top1"], color="grey", linestyle="--", label=f"teacher, {TEACHER_STEPS:,} steps")
    axes.set_xlabel("training steps")
    axes.set_ylabel("top-1 on the test digits, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    chart.savefig(path, dpi=120)


def _row(row: str, steps: int, top1: Sequence[float], work: float) -> dict[str, Any]:
    percent = [round(100 * each, 2) for each in top1]
    mean = round(100 * statistics.mean(top1), 2)
    return {"row": row, "steps": steps, "top1": mean, "top1_of_seeds": percent, "soft_steps": round(work, 1)}


def _trained(config: ConfigDict, folder: pathlib.Path, train: Train) -> float:
    """The accuracy of a run, which is trained unless it is finished."""
    result = folder / files.RESULT_FILE
    if not result.is_file():
        train(config, folder)
    return json.loads(result.read_text())["eval"]["top1"]


def _halved(config: ConfigDict, path: pathlib.Path, halve: Halve) -> dict[str, Any]:
    """The result of a halving, which is made unless it is there."""
    result = path.with_suffix(".json")
    if not result.is_file():
        path.unlink(missing_ok=True)  # a weight file without its result
        result.write_text(json.dumps(halve(config, path)) + "\n")
    return json.loads(result.read_text())


def _training_work(row: str, steps: int) -> float:
    """Work of a row in steps of distillation: forwards once, backwards twice, and the teacher's forwards.

    A HaLViT does the arithmetic of its teacher.
    """
    make, starts_halved, _ = ROWS[row]
    forwards = 3 + bool(make().teacher.init_from)
    return steps * forwards / 4 + (_halving_work(fit=True) if starts_halved else 0.0)


def _halving_work(*, fit: bool) -> float:
    """Work of a halving in steps of distillation: the teacher on all images, and the fit's steps.

    The least squares take about one step and are left out.
    """
    config = digits.vit("halvit_tiny")
    model = build_task(config).model
    macs = counts_of(model).macs
    layer = 2 * model.width * round(model.width * model.ffn_ratio)
    fitted = 3 * layer * FIT_TOKENS * FIT_STEPS * model.depth if fit else 0
    return (IMAGES * macs + fitted) / (4 * config.batch_size * macs)
