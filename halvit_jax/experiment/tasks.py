"""Tasks by name: from the config to the task as it is evaluated and served."""

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from halvit_jax import config as config_lib
from halvit_jax.models import create_model
from halvit_jax.tasks.classification import Classification


def _classification(model: Any, config: ConfigDict) -> Classification:
    return Classification(model, mean=config.task.mean, std=config.task.std, **config.classification)


# config.task.name -> a function of the model and the config. A task with fields reads them from the config's sub-tree
# of its own name. The teacher of a distillation is for training alone: see `teacher.build_distillation`.
TASKS: dict[str, Callable[[Any, ConfigDict], Any]] = {
    "classification": _classification,
    "distillation": _classification,
}


def build_task(config: ConfigDict) -> Any:
    """The model of `config.model` under the task of `config.task`, a `Task` that is `Servable`.

    Raises:
        ValueError: fields that are not allowed or do not fit each other.
    """
    config_lib.validate(config)
    return make_task(config)


def make_task(config: ConfigDict) -> Any:
    """`build_task` without the checks between other fields of the config.

    JAX multiplies float32 matrices in bfloat16 on a TPU and in TF32 on a GPU, unless this process says otherwise; where
    the config says float32 it does (`matmul_precision`).
    """
    if config.task.name not in TASKS:
        raise ValueError(f"task.name={config.task.name!r} is not one of {', '.join(TASKS)}")
    dtype = compute_dtype(config.compute_dtype)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision if dtype == "float32" else None)
    model = create_model(**config.model, dtype=dtype)
    return TASKS[config.task.name](model, config)


def compute_dtype(name: str) -> str:
    """`auto` is bfloat16 on accelerators and float32 on a CPU, where bfloat16 is slow."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
