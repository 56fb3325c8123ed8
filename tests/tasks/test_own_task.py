"""A task from outside the package: stroke width of a digit, through every command, registered in one line."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from flax import linen as nn
from helpers.runs import tiny
from ml_collections import ConfigDict

from halvit_jax import bench, check, export, predict
from halvit_jax import config as config_lib
from halvit_jax.analysis import aot_plan
from halvit_jax.analysis.tpu_topology import Topology
from halvit_jax.cli.preflight import preflight
from halvit_jax.experiment.predictor import predictor_of
from halvit_jax.experiment.tasks import TASKS
from halvit_jax.experiment.trained import load_trained
from halvit_jax.main import run_experiment
from halvit_jax.protocols import DatasetInfo, Loss, ServingModel

NAME = "stroke_width"
METRICS = {"median_error", "rank_correlation", "correlation_of_none"}


class StrokeWidth:
    """Regression of a digit's stroke width in pixels, twice its area over its outline, which its image tells."""

    constants: ClassVar[dict] = {}
    partition_rules = (("", ()),)
    transfer_rules = ()
    primary_metric = "rank_correlation"
    progress_metrics = ("loss",)
    units: ClassVar[dict[str, str]] = {}

    def __init__(self, model: nn.Module, *, delta: float) -> None:
        self._model, self._delta = model, delta

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        size = self._model.image_size
        return {"image": jax.ShapeDtypeStruct((size, size, 3), "uint8"), "mask": jax.ShapeDtypeStruct((), "bool")}

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        size = self._model.image_size
        return self._model.init(key, jnp.zeros((1, size, size, 3)), train=False)["params"], {}

    def loss(
        self, params: Any, model_state: Any, constants: Any, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> Loss:
        del model_state, constants
        images = batch["image"].astype(jnp.float32) / 255.0
        rngs = {"drop_path": key}
        widths = self._model.apply({"params": params}, images, train=True, rngs=rngs)[:, 0]
        errors = jnp.abs(widths - stroke_width(images))
        huber = jnp.where(errors < self._delta, errors**2 / 2, self._delta * (errors - self._delta / 2))
        mask = batch["mask"].astype(jnp.float32)
        total, examples = jnp.sum(huber * mask), jnp.sum(mask)
        return Loss(total / examples, {}, {"loss": total, "examples": examples})

    def score(self, params: Any, model_state: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        images = batch["image"].astype(jnp.float32) / 255.0
        del model_state
        return {"found": self._widths({"params": params}, images), "true": stroke_width(images)}

    def collector(self, info: Any) -> "Ranks":
        return Ranks()

    def summary_images(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {"digits": batch["image"][:4].astype(jnp.float32) / 255.0}

    def check_dataset(self, info: DatasetInfo) -> None:
        if info.name != "digits":
            raise ValueError(f"data.name={info.name!r} has no strokes; set data.name='digits'")

    def serving(self, variables: Any, *, folded: bool = True) -> ServingModel:
        del folded
        size = self._model.image_size

        def serve(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
            return {"width": self._widths(variables, images.astype(jnp.float32) / 255.0)}

        return ServingModel(serve, variables, (size, size))

    def decode(self, outputs: Any, info: DatasetInfo) -> list[dict[str, Any]]:
        del info
        return [{"stroke_width": float(width)} for width in outputs["width"]]

    def _widths(self, variables: Any, images: jax.Array) -> jax.Array:
        return self._model.apply(variables, images, train=False)[:, 0]


class Ranks:
    """The median error and Spearman's rank correlation over the whole set, neither of them a mean over examples."""

    reads = ("mask",)

    def __init__(self) -> None:
        self._found: list[float] = []
        self._true: list[float] = []

    def add(self, scored: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
        self._found += scored["found"][batch["mask"]].tolist()
        self._true += scored["true"][batch["mask"]].tolist()

    def result(self) -> dict[str, float | None]:
        found, true = np.array(self._found), np.array(self._true)
        ranks = [np.argsort(np.argsort(values)) for values in (found, true)]
        correlation = float(np.corrcoef(*ranks)[0, 1])
        error = float(np.median(np.abs(found - true)))
        return {"median_error": error, "rank_correlation": correlation, "correlation_of_none": None}


def stroke_width(images: jax.Array) -> jax.Array:
    """[b, h, w, 3] in [0, 1] -> [b]."""
    ink = images[..., 0]
    outline = jnp.abs(jnp.diff(ink, axis=1)).sum((1, 2)) + jnp.abs(jnp.diff(ink, axis=2)).sum((1, 2))
    return 2 * ink.sum((1, 2)) / jnp.maximum(outline, 1.0)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The one line that makes the task known."""
    TASKS[NAME] = lambda model, config: StrokeWidth(model, **config.stroke_width)
    yield
    del TASKS[NAME]


def own_config(digits_dir: pathlib.Path, **changes: Any) -> ConfigDict:
    config = tiny(digits_dir, **{"task.name": NAME, "model.num_classes": 1, "optim.schedule": "constant"} | changes)
    config_lib.add_task_fields(config, NAME, {"delta": 1.0})
    return config


@pytest.fixture(scope="module")
def trained(digits_dir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, Any]]:
    """A finished run of the task, and its result."""
    workdir = tmp_path_factory.mktemp("own")
    return workdir, run_experiment(own_config(digits_dir), workdir)


def test_an_own_task_trains_and_evaluates_with_metrics_of_its_own(
    trained: tuple[pathlib.Path, dict[str, Any]], digits_dir: pathlib.Path
) -> None:
    workdir, result = trained
    assert result["eval"].keys() == result["ema_eval"].keys() == METRICS
    assert -1 <= result["eval"]["rank_correlation"] <= 1
    assert json.loads((workdir / "result.json").read_text())["eval"]["correlation_of_none"] is None
    evaluated = run_experiment(own_config(digits_dir), workdir, mode="eval")
    assert evaluated == {name: result[name] for name in ("eval", "ema_eval")}


@pytest.mark.slow
def test_an_own_task_resumes_bit_for_bit(
    trained: tuple[pathlib.Path, dict[str, Any]], digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run_experiment(own_config(digits_dir, total_steps=4), tmp_path)
    resumed = run_experiment(own_config(digits_dir), tmp_path, resume_changed=True)
    assert resumed["params_sha256"] == trained[1]["params_sha256"]


def test_an_own_task_predicts_and_is_exported(
    trained: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    digit = tmp_path / "digit.png"
    tf.io.write_file(str(digit), tf.io.encode_png(np.full((8, 8, 1), 100, np.uint8)))
    model = load_trained(trained[0])
    ((row, _),) = predict.predict(predictor_of(model), [str(digit)])
    assert row.keys() == {"image", "stroke_width"}
    out = tmp_path / "model.zip"
    lines = export.verify_export(model, export.export(model, "stablehlo", out), out)
    assert lines[1].startswith("largest difference of output width: ")
    assert lines[2] == "the same best answer for 364 of the 364 images of the evaluation set"


def test_an_own_task_is_checked_before_and_after_its_run(
    trained: tuple[pathlib.Path, dict[str, Any]], digits_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preflight(own_config(digits_dir), None, compile_step=True) == 0
    assert "ok    dataset     fits the task" in capsys.readouterr().out
    assert check.verify(trained[0]) == 0
    assert f"step 8  good, score {trained[1]['ema_eval']['rank_correlation']:.6g}" in capsys.readouterr().out


@pytest.mark.slow
def test_an_own_task_is_benchmarked_and_planned(digits_dir: pathlib.Path) -> None:
    (row,) = bench.measure({NAME: own_config(digits_dir)}, repeats=1)
    assert row["infer_images_per_s"] > 0
    assert row["train_images_per_s"] > 0
    target = aot_plan.prepare(own_config(digits_dir), Topology("v5e", (2, 4)), jax.devices())
    assert target.batch.keys() == {"image", "mask", "request"}
