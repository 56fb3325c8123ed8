"""Tasks by their names in the config."""

import pathlib

import pytest
from helpers.runs import tiny

from halvit_jax import bench


def test_an_unknown_task_is_refused_with_the_list_of_names(digits_dir: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"task.name='segmentation' is not one of classification, distillation"):
        bench.measure({"x": tiny(digits_dir, **{"task.name": "segmentation"})}, repeats=1)
