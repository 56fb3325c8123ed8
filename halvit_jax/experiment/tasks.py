"""From `config.task` to the task of a run, as it is evaluated."""

import jax
from ml_collections import ConfigDict

from halvit_jax import config as config_lib
from halvit_jax.models import create_model
from halvit_jax.tasks.classification import Classification

TASKS = ("classification", "distillation")  # what was distilled is evaluated as what was not


def build_task(config: ConfigDict) -> Classification:
    """The model of `config.model` under the task of `config.task`, as it is evaluated; a teacher is for training alone.

    Raises:
        ValueError: fields that are not allowed or do not fit each other.
    """
    config_lib.validate(config)
    if config.task.name not in TASKS:
        raise ValueError(f"task.name={config.task.name!r} is not one of {', '.join(TASKS)}")
    model = create_model(**config.model, dtype=compute_dtype(config.compute_dtype))
    return Classification(model, mean=config.task.mean, std=config.task.std, **config.classification)


def compute_dtype(name: str) -> str:
    """`auto` is bfloat16 on accelerators and float32 on a CPU, where bfloat16 is slow."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
