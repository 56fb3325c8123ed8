"""Benchmarks: speed and memory of models on this machine, of the input pipeline, or all families side by side.

python -m halvit_jax.bench --models=halvit_tiny,deit_small --batch=8 [--dtype=float32] [--repeats=5] [--json]
python -m halvit_jax.bench --config=configs/NAME.py --batch=8          the task, model and optimizer of a config
python -m halvit_jax.bench --what=detect --config=configs/coco_mask_rcnn.py:resnet50 --batch=2 [--against=torch]
python -m halvit_jax.bench --what=input [--batch=64]
python -m halvit_jax.bench --what=families [--workdir=runs/families] [--seeds=3] [--steps=600] [--families=ViT,HaLViT]
python -m halvit_jax.bench --what=halve [--workdir=runs/halve] [--seeds=3] [--plot=FILE.svg]
python -m halvit_jax.bench --what=signs [--workdir=runs/signs] [--seeds=5]

Only one device is used. The models take turns within every round, so that drift of a shared machine affects all
of them equally; figures are medians over the rounds. A training step is forward, backward and update.
"""

import gc
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from halvit_jax.analysis.hlo import memory_of
from halvit_jax.cli import app
from halvit_jax.config import default_config
from halvit_jax.protocols import Array, ArraySpec

STEPS_PER_EPOCH, EPOCHS = 1000, 300  # of a schedule; no figure depends on them
OBJECTS = 7  # on an image of COCO, on average


def define_flags() -> None:
    """Define the command-line flags."""
    flags.DEFINE_enum("what", "models", list(BENCHMARKS), "What to measure.")
    config_flags.DEFINE_config_file("config", None, "File of configs/ to benchmark instead of --models.")
    flags.DEFINE_list("models", ["halvit_tiny", "deit_small"], "Names, separated by commas.")
    flags.DEFINE_integer("batch", 8, "Images in a step.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "The type to compute in.")
    flags.DEFINE_integer("repeats", 5, "Rounds.", lower_bound=1)
    flags.DEFINE_bool("json", False, "One JSON object a line instead of a table.")
    flags.DEFINE_string("workdir", None, "Folder for the runs of families, halving or signs; else runs/WHAT.")
    flags.DEFINE_enum("against", None, ["torch"], "Of detect: also measure torchvision's Mask R-CNN, in turns.")
    flags.DEFINE_string("plot", None, "Of halving: a .svg or .png file for the picture.")
    flags.DEFINE_integer("seeds", 3, "Runs of each family, or of each row of halving or signs.", lower_bound=1)
    flags.DEFINE_integer("steps", 600, "Length of each run of the families.", lower_bound=1)
    flags.DEFINE_list("families", [], "The families to measure; without it one or two of each kind.")


class ModelBenchmark:
    """The task and model of a config, compiled for inference and for training steps on one random batch.

    `alter` changes the initial variables {"params": ...} that inference has.
    """

    def __init__(
        self, name: str, config: ConfigDict, alter: Callable[[Any], Any] = lambda variables: variables
    ) -> None:
        from halvit_jax.experiment import build, tasks
        from halvit_jax.training.sharding import bytes_of, make_mesh
        from halvit_jax.training.state import init_state

        task = tasks.build_task(config)
        optimizer = build.build_optimizer(config, steps_per_epoch=STEPS_PER_EPOCH)
        self.name, self._constants = name, task.constants
        self._batch = random_batch(task.batch_spec(), config.batch_size)
        abstract = build.build_abstract_state(config, task, optimizer, make_mesh(devices=jax.devices()[:1]))
        use_ema, guard = config.loop.ema_decay > 0, build.make_guard(**config.skip_updates)
        self._state = init_state(task, optimizer, abstract, seed=config.seed, use_ema=use_ema, guard=guard)
        self.task, self.batch = task, self._batch
        self.state_bytes = bytes_of(self._state.params) + bytes_of(self._state.opt_state)

        started = time.perf_counter()
        step = build.build_train_step(config, task, optimizer)
        self._step = step.lower(self._state, self._constants, self._batch).compile()
        self.compile_s = time.perf_counter() - started
        self.peak_bytes = _peak_bytes(self._step)
        variables = alter({"params": self._state.params, **self._state.model_state})
        variables = self.variables = jax.tree.map(jnp.copy, variables)  # training donates the state's own
        self._infer = self._inference(task.serving(variables, folded=False))
        has_norms = bool(self._state.model_state) and config.task.name != "detection"  # whose norms are not folded
        self.infer_folded = self._inference(task.serving(variables)) if has_norms else None

    def infer(self) -> None:
        """Run one batch of inference to the end."""
        self._infer()

    def train(self) -> None:
        """Run one training step to the end."""
        self._state, report = self._step(self._state, self._constants, self._batch)
        jax.block_until_ready((self._state, report))

    def _inference(self, serving: Any) -> Callable[[], None]:
        """A function that runs one batch of inference to the end."""
        variables = serving.variables
        given = [self._batch[name] for name in serving.inputs]
        compiled = jax.jit(serving.apply).lower(variables, *given).compile()
        return lambda: jax.block_until_ready(compiled(variables, *given))


def random_batch(spec: Mapping[str, ArraySpec], batch_size: int) -> dict[str, Array]:
    """Random images and numbers, labels of 0 and masks of True, in the shapes of `Task.batch_spec()`.

    Of detection: images that fill their canvas, with 7 boxes of all sizes.
    """
    rng = np.random.default_rng(0)

    def values(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if dtype == np.uint8:
            return rng.integers(0, 256, shape, np.uint8)
        if np.issubdtype(dtype, np.floating):
            return rng.standard_normal(shape).astype(dtype)
        return np.full(shape, dtype.kind == "b", dtype)

    batch = {name: values((batch_size, *one.shape), np.dtype(one.dtype)) for name, one in spec.items()}
    if "boxes" in spec:
        sides = np.array(spec["image"].shape[:2], np.int32)
        batch["size"], batch["original"] = (np.tile(sides, (batch_size, 1)) for _ in range(2))
        ends = np.sort(rng.random((*batch["boxes"].shape[:-1], 2, 2)), -2) * sides[::-1]
        batch["boxes"] = ends.reshape(batch["boxes"].shape).astype(np.float32)
        batch["real"] &= np.arange(batch["real"].shape[1]) < OBJECTS
    return {name: jnp.asarray(array) for name, array in batch.items()}


def config_of(name: str, *, batch: int, dtype: str) -> ConfigDict:
    """The default config with this model."""
    config = default_config()
    config.model.name, config.compute_dtype = name, dtype
    config.batch_size, config.num_epochs = batch, EPOCHS
    return config


def measure(configs: Mapping[str, ConfigDict], *, repeats: int) -> list[dict[str, Any]]:
    """One row of figures for each config, in the order given."""
    subjects = [ModelBenchmark(name, config) for name, config in configs.items()]
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
    speeds = {key: round(configs[key[0]].batch_size / statistics.median(each), 2) for key, each in times.items()}
    return [
        {
            "model": subject.name,
            "device": device,
            "batch": config.batch_size,
            "dtype": config.compute_dtype,
            "compile_s": round(subject.compile_s, 2),
            "infer_images_per_s": speeds[subject.name, "infer"],
            "infer_folded_images_per_s": speeds.get((subject.name, "folded")),  # if there is BatchNorm
            "train_images_per_s": speeds[subject.name, "train"],
            "train_peak_bytes": subject.peak_bytes,
            "params_and_optimizer_bytes": subject.state_bytes,
        }
        for subject, config in zip(subjects, configs.values(), strict=True)
    ]


def configs_to_measure(given: Any) -> dict[str, ConfigDict]:
    """The configs of the flags: one for each of --models, or that of --config with this batch and dtype.

    Raises:
        ValueError: an unknown model, or a config that is not valid.
    """
    from halvit_jax.experiment import tasks

    if given.config is None:
        configs = {name: config_of(name, batch=given.batch, dtype=given.dtype) for name in given.models}
    else:
        config = given.config.copy_and_resolve_references()
        config.batch_size, config.compute_dtype = given.batch, given.dtype
        configs = {tasks.model_name(config): config}
    for config in configs.values():
        tasks.build_task(config)
    return configs


def main(argv: list[str]) -> None:
    """Measure and print."""
    given = flags.FLAGS
    with app.report_user_errors():
        app.reject_positional_args(argv, "name models with --models=a,b")
        if given.against is not None and given.what != "detect":
            raise ValueError(f"--against={given.against} is for --what=detect")
        configs = configs_to_measure(given)
    measured, report = BENCHMARKS[given.what]
    rows = measured(given, configs)
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


def measure_input(given: Any, configs: Mapping[str, ConfigDict]) -> list[dict[str, Any]]:
    """One row for each image transform."""
    del configs
    from halvit_jax.data import benchmark, hide_accelerators

    hide_accelerators()
    return benchmark.measure_input(batch=given.batch, rounds=given.repeats)


def report_input(rows: list[dict[str, Any]], given: Any) -> None:
    """The rows of `measure_input` as a table."""
    print(f"{os.cpu_count()} cores, batches of {given.batch}, JPEGs of 500x375, medians of {given.repeats} rounds")
    columns = "{:<28} {:>10} {:>20} {:>10}"
    print(columns.format("what", "images/s", "images/s per core", "of bare"))
    for row in rows:
        share = row["images_per_s_per_core"] / rows[0]["images_per_s_per_core"]
        print(columns.format(row["what"], row["images_per_s"], row["images_per_s_per_core"], f"{share:.2f}"))


def measure_detect(given: Any, configs: Mapping[str, ConfigDict]) -> list[dict[str, Any]]:
    """Rows of the whole detector, of its stages, of the formulations of its operators, and of torchvision's."""
    from halvit_jax.analysis import detection_benchmark

    name, config = next(iter(configs.items()))
    with app.report_user_errors():
        if config.task.name != "detection":
            raise ValueError(
                "--what=detect needs a --config of task.name='detection', such as configs/coco_mask_rcnn.py:resnet50"
            )
        return detection_benchmark.measure(
            name, config, subject=ModelBenchmark, against=given.against, repeats=given.repeats
        )


def report_detect(rows: list[dict[str, Any]], given: Any) -> None:
    """The rows of `measure_detect` as a table for each kind."""
    from halvit_jax.analysis import detection_benchmark

    print(f"{jax.devices()[0].device_kind}, batch {given.batch}, {given.dtype}, medians of {given.repeats} rounds")
    print(detection_benchmark.tables(rows))


def measure_families(given: Any, configs: Mapping[str, ConfigDict]) -> list[dict[str, Any]]:
    """One row for each family, and a picture of all in the workdir."""
    del configs
    from halvit_jax import main
    from halvit_jax.analysis import family_benchmark

    with app.report_user_errors():
        family_benchmark.validate_labels(given.families)
    labels, workdir = given.families or family_benchmark.DEFAULT, _workdir(given)
    lengths = {"seeds": given.seeds, "steps": given.steps, "repeats": given.repeats}
    return family_benchmark.measure(labels, workdir, train=main.run_experiment, **lengths)


def report_families(rows: list[dict[str, Any]], given: Any) -> None:
    """The rows of `measure_families` as a table and a picture."""
    from halvit_jax.analysis import family_benchmark

    print(family_benchmark.table(rows))
    picture = _workdir(given) / "family_benchmark.png"
    with app.report_user_errors():
        family_benchmark.plot(rows, picture)
    print(f"accuracy against parameters: {picture}")


def measure_halve(given: Any, configs: Mapping[str, ConfigDict]) -> list[dict[str, Any]]:
    """One row for each student of the table of halving."""
    del configs
    from halvit_jax import main
    from halvit_jax.analysis import halve_benchmark
    from halvit_jax.experiment import halve

    def halve_to(config: ConfigDict, out: pathlib.Path) -> dict[str, Any]:
        with app.report_user_errors():
            lengths = {"images": halve_benchmark.IMAGES, "fit_steps": halve_benchmark.FIT_STEPS}
            result = halve.run(halve.prepare(config, source="", **lengths), out, log=print)
        if "stopped" in result:
            app.stopped(f"{result['stopped']}: the same command goes on from there")
        return result

    return halve_benchmark.measure(_workdir(given), train=main.run_experiment, halve=halve_to, seeds=given.seeds)


def report_halve(rows: list[dict[str, Any]], given: Any) -> None:
    """The rows of `measure_halve` as a table, and as a picture with --plot."""
    from halvit_jax.analysis import halve_benchmark

    print(halve_benchmark.table(rows))
    if given.plot:
        with app.report_user_errors():
            halve_benchmark.plot(rows, pathlib.Path(given.plot))
        print(f"accuracy against steps: {given.plot}")


def measure_signs(given: Any, configs: Mapping[str, ConfigDict]) -> list[dict[str, Any]]:
    """One row for each choice of the signs of a HaLViT's norms."""
    del configs
    from halvit_jax import main
    from halvit_jax.analysis import norm_signs

    return norm_signs.measure(_workdir(given), train=main.run_experiment, seeds=given.seeds)


def report_signs(rows: list[dict[str, Any]], given: Any) -> None:
    """The rows of `measure_signs` as a table."""
    del given
    from halvit_jax.analysis import norm_signs

    print(norm_signs.table(rows))


# --what -> a function of the flags and their configs that measures rows, and one that prints them.
BENCHMARKS: dict[str, tuple[Callable[..., list[dict[str, Any]]], Callable[..., None]]] = {
    "models": (lambda given, configs: measure(configs, repeats=given.repeats), report_models),
    "detect": (measure_detect, report_detect),
    "input": (measure_input, report_input),
    "families": (measure_families, report_families),
    "halve": (measure_halve, report_halve),
    "signs": (measure_signs, report_signs),
}


def _workdir(given: Any) -> pathlib.Path:
    return pathlib.Path(given.workdir or f"runs/{given.what}")


def _seconds(run: Callable[[], None]) -> float:
    gc.collect()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _peak_bytes(compiled: Any) -> int:
    """Memory of the compiled step on a device: its arguments, outputs and temporaries, donated ones once."""
    sizes = memory_of(compiled)
    return sizes["arguments"] + sizes["temporaries"] + sizes["output"]


if __name__ == "__main__":
    define_flags()
    app.run(main)
