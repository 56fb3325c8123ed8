"""How fast models run on this machine, and what they weigh; how fast images are read; or all families side by side.

python -m halvit_jax.bench --models=halvit_tiny,deit_small --batch=8 [--dtype=float32] [--repeats=5] [--json]
python -m halvit_jax.bench --what=input [--batch=64]
python -m halvit_jax.bench --what=families [--workdir=runs/families] [--seeds=3] [--steps=600] [--families=ViT,HaLViT]

One device works, however many there are. The models take turns within every round, so that drift of a shared machine
hits all of them alike; figures are medians over the rounds. A training step is forward, backward and AdamW's update.
"""

import gc
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from halvit_jax.analysis.hlo import memory_of
from halvit_jax.cli import app
from halvit_jax.config import default_config


def define_flags() -> None:
    """The flags of this door."""
    flags.DEFINE_enum("what", "models", ["models", "input", "families"], "Models, the input pipeline, or families.")
    flags.DEFINE_list("models", ["halvit_tiny", "deit_small"], "Names, separated by commas.")
    flags.DEFINE_integer("batch", 8, "Images of a step.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "The type to compute in.")
    flags.DEFINE_integer("repeats", 5, "Rounds.", lower_bound=1)
    flags.DEFINE_bool("json", False, "One JSON object a line instead of a table.")
    flags.DEFINE_string("workdir", "runs/families", "Where the runs of the families lie, and their picture.")
    flags.DEFINE_integer("seeds", 3, "Runs of each family.", lower_bound=1)
    flags.DEFINE_integer("steps", 600, "Length of each run.", lower_bound=1)
    flags.DEFINE_list("families", [], "The families to measure; without it one or two of each kind.")


class Subject:
    """One model, compiled for inference and for training steps on one batch of noise."""

    def __init__(self, name: str, *, batch: int, dtype: str) -> None:
        from halvit_jax.models import create_model
        from halvit_jax.tasks.classification import Classification
        from halvit_jax.training.optim import make_optimizer
        from halvit_jax.training.sharding import bytes_of, make_mesh
        from halvit_jax.training.state import abstract_state, init_state
        from halvit_jax.training.step import make_train_step

        config = default_config()
        model = create_model(name, dtype=dtype)
        task = Classification(model, mean=config.task.mean, std=config.task.std, **config.classification)
        optimizer = make_optimizer(**config.optim, batch_size=batch, steps_per_epoch=1000, total_steps=300_000)
        size = task.model.image_size
        rng = np.random.default_rng(0)
        self.name, self._task = name, task
        self._batch = {
            "image": jnp.asarray(rng.integers(0, 256, (batch, size, size, 3), np.uint8)),
            "label": jnp.asarray(rng.integers(0, task.model.num_classes, batch, np.int32)),
            "mask": jnp.ones(batch, bool),
        }
        mesh = make_mesh(devices=jax.devices()[:1])
        abstract = abstract_state(task, optimizer, mesh=mesh, use_ema=False)
        self._state = init_state(task, optimizer, abstract, seed=0, use_ema=False)
        self.state_bytes = bytes_of(self._state.params) + bytes_of(self._state.opt_state)

        started = time.perf_counter()
        step = make_train_step(task, optimizer, seed=0, ema_decay=0.0).lower(self._state, {}, self._batch).compile()
        self.compile_s = time.perf_counter() - started
        self._step = step
        self._infer = jax.jit(task.predict).lower(self._state.params, self._state.model_state, self._batch).compile()
        self.peak_bytes = _peak_bytes(step)
        self.infer_folded = self._folded() if self._state.model_state else None

    def infer(self) -> None:
        """One batch of inference, to the end."""
        jax.block_until_ready(self._infer(self._state.params, self._state.model_state, self._batch))

    def _folded(self) -> Callable[[], None]:
        """One batch of inference with the batch normalisations folded."""
        from halvit_jax.models import fold

        model, variables = fold(self._task.model, {"params": self._state.params, **self._state.model_state})
        variables, images = jax.device_put(variables), self._batch["image"]
        call = jax.jit(lambda variables, images: model.apply(variables, self._task.normalise(images), train=False))
        compiled = call.lower(variables, images).compile()
        return lambda: jax.block_until_ready(compiled(variables, images))

    def train(self) -> None:
        """One training step, to the end."""
        self._state, sums = self._step(self._state, {}, self._batch)
        jax.block_until_ready((self._state, sums))


def measure(names: list[str], *, batch: int, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """One row of figures for each model, in the order given."""
    subjects = [Subject(name, batch=batch, dtype=dtype) for name in names]
    times: dict[tuple[str, str], list[float]] = {}
    for round_number in range(repeats + 1):
        for subject in subjects:
            for what, run in (("infer", subject.infer), ("folded", subject.infer_folded), ("train", subject.train)):
                if run is None:
                    continue
                seconds = _seconds(run)
                if round_number:  # the first round only warms up
                    times.setdefault((subject.name, what), []).append(seconds)
    device = jax.devices()[0].device_kind
    speeds = {key: round(batch / statistics.median(each), 2) for key, each in times.items()}
    return [
        {
            "model": subject.name,
            "device": device,
            "batch": batch,
            "dtype": dtype,
            "compile_s": round(subject.compile_s, 2),
            "infer_images_per_s": speeds[subject.name, "infer"],
            "infer_folded_images_per_s": speeds.get((subject.name, "folded")),  # where there is BatchNorm
            "train_images_per_s": speeds[subject.name, "train"],
            "train_peak_bytes": subject.peak_bytes,
            "params_and_optimizer_bytes": subject.state_bytes,
        }
        for subject in subjects
    ]


def main(argv: list[str]) -> None:
    """Measure and print."""
    with app.bad_input():
        app.no_arguments(argv, "name models with --models=a,b")
        from halvit_jax.models import create_model

        given = flags.FLAGS
        for name in given.models:
            create_model(name)
    if given.what == "input":
        rows = measure_input(batch=given.batch, repeats=given.repeats)
        report = report_input
    elif given.what == "families":
        rows = measure_families(given)
        report = report_families
    else:
        rows = measure(given.models, batch=given.batch, dtype=given.dtype, repeats=given.repeats)
        report = report_models
    if given.json:
        for row in rows:
            print(json.dumps(row))
        return
    report(rows, given)


def report_models(rows: list[dict[str, Any]], given: Any) -> None:
    """The rows of `measure` as a table."""
    print(f"{rows[0]['device']}, batch {given.batch}, {given.dtype}, medians of {given.repeats} rounds")
    columns = "{:<26} {:>10} {:>15} {:>7} {:>15} {:>10} {:>21}"
    head = ("model", "compile s", "infer images/s", "folded", "train images/s", "peak MiB", "params+optimizer MiB")
    print(columns.format(*head))
    for row in rows:
        mebibytes = [f"{row[key] / 2**20:,.1f}" for key in ("train_peak_bytes", "params_and_optimizer_bytes")]
        speeds = row["infer_images_per_s"], row["infer_folded_images_per_s"] or "", row["train_images_per_s"]
        print(columns.format(row["model"], row["compile_s"], *speeds, *mebibytes))


def measure_input(*, batch: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each way of preparing images."""
    from halvit_jax.data import benchmark, hide_accelerators

    hide_accelerators()
    return benchmark.measure(batch=batch, rounds=repeats)


def report_input(rows: list[dict[str, Any]], given: Any) -> None:
    """The rows of `measure_input` as a table."""
    print(f"{os.cpu_count()} cores, batches of {given.batch}, JPEGs of 500x375, medians of {given.repeats} rounds")
    columns = "{:<20} {:>10} {:>20} {:>10}"
    print(columns.format("what", "images/s", "images/s per core", "of bare"))
    for row in rows:
        share = row["images_per_s_per_core"] / rows[0]["images_per_s_per_core"]
        print(columns.format(row["what"], row["images_per_s"], row["images_per_s_per_core"], f"{share:.2f}"))


def measure_families(given: Any) -> list[dict[str, Any]]:
    """One row for each family, and a picture of all in the workdir."""
    from halvit_jax.analysis import family_benchmark

    with app.bad_input():
        family_benchmark.check(given.families)
    labels, workdir = given.families or family_benchmark.DEFAULT, pathlib.Path(given.workdir)
    return family_benchmark.measure(labels, workdir, seeds=given.seeds, steps=given.steps, repeats=given.repeats)


def report_families(rows: list[dict[str, Any]], given: Any) -> None:
    """The rows of `measure_families` as a table and a picture."""
    from halvit_jax.analysis import family_benchmark

    print(family_benchmark.table(rows))
    picture = pathlib.Path(given.workdir) / "family_benchmark.png"
    with app.bad_input():
        family_benchmark.draw(rows, picture)
    print(f"accuracy against parameters: {picture}")


def _seconds(run: Callable[[], None]) -> float:
    gc.collect()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _peak_bytes(compiled: Any) -> int:
    """Memory the compiled step needs on a device: its arguments, outputs and temporaries, donated ones once."""
    sizes = memory_of(compiled)
    return sizes["arguments"] + sizes["temporaries"] + sizes["output"]


if __name__ == "__main__":
    define_flags()
    app.run(main)
