"""What the shared vocabulary promises to those who use it."""

from typing import Any

import jax
import numpy as np
import pytest
from helpers.runs import classification, tiny

from halvit_jax.experiment.tasks import TASKS, build_task
from halvit_jax.models import create_model
from halvit_jax.protocols import Collector, DatasetInfo, ExitCode, Servable, ServingModel, Task

INFO = DatasetInfo(["a"], 1, extra={"eval_annotations": "instances.json", "category_ids": [1]})


def _members(protocol: type) -> set[str]:
    """The attributes and methods that a protocol names."""
    return {name for name in protocol.__annotations__.keys() | vars(protocol).keys() if not name.startswith("_")}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_a_task_that_is_servable(name: str) -> None:
    needed = {
        "distillation": {"teacher.init_from": "x", "model.distilled": True},
        "detection": {"model.num_classes": 0},
    }
    task = build_task(tiny("", **{"task.name": name} | needed.get(name, {})))
    assert [member for member in _members(Task) | _members(Servable) if not hasattr(task, member)] == []
    assert [member for member in _members(Collector) if not hasattr(task.collector(INFO), member)] == []


def test_a_serving_model_can_be_compiled_and_is_called_with_images_alone() -> None:
    model = ServingModel(lambda scale, images: scale * images.mean((1, 2, 3)), variables=2.0, input_size=(4, 4))
    images = np.full((3, 4, 4, 3), 100, np.uint8)
    np.testing.assert_allclose(model(images), np.full(3, 200.0))
    np.testing.assert_allclose(jax.jit(model)(images), np.full(3, 200.0))


def test_a_task_that_serves_reads_images_of_the_size_of_its_batch_spec() -> None:
    task: Any = classification(create_model("halvit_tiny", image_size=32, depth=1, num_classes=3))
    variables = jax.eval_shape(lambda: task.init(jax.random.key(0)))[0]
    assert task.serving({"params": variables}).input_size == task.batch_spec()["image"].shape[:2] == (32, 32)


def test_facts_about_a_data_set_have_defaults() -> None:
    assert DatasetInfo(["a"], 3) == DatasetInfo(["a"], 3, name="", extra={})


def test_exit_codes_are_those_that_the_launch_scripts_know() -> None:
    codes = {"DONE": 0, "PARTLY": 1, "BAD_INPUT": 2, "FATAL_RUN": 3, "STALLED": 70, "PREEMPTED": 75}
    assert {code.name: code.value for code in ExitCode} == codes
