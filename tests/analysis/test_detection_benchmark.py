"""The benchmark of detectors: its stages are the detector, cut into parts."""

from typing import Any

import jax
import numpy as np
import pytest

from halvit_jax import bench
from halvit_jax.analysis import detection_benchmark
from halvit_jax.analysis.detection_benchmark import STAGES, formulations, likely, measure, take_turns
from halvit_jax.experiment.tasks import build_task
from halvit_jax.recipes import detection


def _config(detector: str = "mask_rcnn") -> Any:
    config = detection.scenes(detector, "halvit_tiny" if detector == "mask_rcnn" else "regnety_002")
    config.batch_size = 2
    config.instances.update({"canvases": ((64, 64),), "max_objects": 9})
    config.detection.update({"width": 16, "detections": 5})
    if detector == "mask_rcnn":
        config.model.update({"width": 32, "depth": 1, "num_heads": 2})
        config.detection.update({"hidden": 24, "mask_depth": 1, "train_proposals": 30, "test_proposals": 20})
    return config


@pytest.mark.slow
def test_the_stages_of_mask_rcnn_find_what_the_detector_finds() -> None:
    config = _config()
    task = build_task(config)
    params, state = task.init(jax.random.key(0))
    variables = likely({"params": params, **state})
    batch = bench.random_batch(task.batch_spec(), 2)
    given: dict[str, Any] = {"image": task.normalise(batch["image"]), "size": batch["size"], "truth": batch}
    stages = STAGES["MaskRCNN"](task.model)
    for stage in stages:
        run = jax.jit(lambda given, stage=stage: task.model.apply(variables, given, method=stage.run))
        given = {**given, **run(given)}
        assert all(name in variables["params"] or name == "norms" for name in stage.trained)
    found = jax.jit(task.score)(variables["params"], {}, batch)
    assert found["valid"].any()
    np.testing.assert_allclose(given["found"], found["boxes"], atol=1e-3)
    np.testing.assert_array_equal(given["labels"], found["labels"])
    trained = {name for stage in stages for name in stage.trained}
    assert trained - {"norms"} == set(variables["params"])  # every parameter is run backwards once
    assert given["targets"].shape[2:] == (28, 28)


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["mask_rcnn", "retinanet"])
def test_a_detector_is_measured_whole_by_stage_and_by_formulation(
    detector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = measure("mine", _config(detector), subject=bench.ModelBenchmark, against=None, repeats=1)
    whole, stages, forms = ([row for row in rows if row["kind"] == k] for k in ("whole", "stage", "formulation"))
    assert [row["model"] for row in whole] == ["mine"]
    assert whole[0]["infer_ms"] > 0
    assert whole[0]["train_ms"] > 0
    names = ["backbone", "neck", "RPN head", "proposals", "RoIAlign 7x7", "NMS of detections", "box head"]
    expected = {*names, "mask head", "mask targets"} if detector == "mask_rcnn" else {"backbone", "neck", "head"}
    assert expected <= {row["stage"] for row in stages}
    assert all(row["infer_ms"] or row["train_ms"] for row in stages)
    operators = {(row["operator"], row["formulation"]) for row in forms}
    assert {("RoIAlign", "dense"), ("RoIAlign", "window"), ("NMS", "fixed_point"), ("NMS", "sequential")} <= operators
    text = detection_benchmark.tables(rows)
    assert text.count("\n\n") == 2
    assert "kind" not in text


def test_all_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []
    times = take_turns({name: lambda name=name: order.append(name) for name in ("a", "b")}, repeats=2)
    assert order == ["a", "b"] * 3
    assert times.keys() == {"a", "b"}


@pytest.mark.slow
def test_formulations_are_timed_on_maps_of_any_size() -> None:
    rows = formulations({4: (8, 8), 8: (4, 4)}, channels=2, boxes=3, candidates=5, repeats=1)
    assert all(row["ms"] > 0 for row in rows)
