"""Small runs for tests: a config of a few steps, and what a finished run is."""

import pathlib
from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict

from halvit_jax.config import default_config
from halvit_jax.recipes import digits
from halvit_jax.tasks.classification import Classification

MAIN = "halvit_jax.main"
Finished = tuple[pathlib.Path, dict[str, Any]]  # a workdir and the result of its run


def tiny(digits_dir: pathlib.Path, **changes: Any) -> ConfigDict:
    """The digits run made small: two narrow blocks, eight steps, every kind of state and randomness on."""
    config = digits.vit("halvit_tiny")
    config.update_from_flattened_dict(
        {
            "batch_size": 32,
            "total_steps": 8,
            "loop.log_every": 2,
            "loop.eval_every": 4,
            "loop.checkpoint_every": 4,
            "model.width": 32,
            "model.depth": 2,
            "model.num_heads": 2,
            "model.drop_path": 0.2,
            "data.data_dir": str(digits_dir),
            "report_images": 0,
            "classification.label_smoothing": 0.1,
            "classification.mixup": 0.8,
            "classification.cutmix": 1.0,
            "classification.erase": 0.25,
            "optim.warmup_epochs": 0.0,
        }
        | changes
    )
    return config


def classification(model: nn.Module, **changes: Any) -> Classification:
    """The default task of a model."""
    config = default_config()
    fields = {"mean": config.task.mean, "std": config.task.std, **config.classification}
    return Classification(model, **fields | changes)
