"""halvit_jax: vision models with half of the weights, and the trainer that makes them, in JAX.

model = halvit_jax.create_model("halvit_tiny", num_classes=10)   # a flax.linen.Module
variables = model.init(jax.random.key(0), images, train=False)   # images [b, h, w, 3], normalised, float32
logits = model.apply(variables, images, train=False)
model, variables = halvit_jax.load("runs/halvit_digits")         # the trained model of a run
"""

import os
from typing import Any

from flax import linen as nn

from halvit_jax.models import create_model, list_models

__all__ = ["create_model", "list_models", "load"]


def load(workdir: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a run and its trained variables: the averages where the run kept them, of the newest checkpoint.

    The model computes in float32 and wants images normalised with the mean and deviation of the run's config.

    Raises:
        ValueError: no run or no checkpoint in this workdir.
    """
    from halvit_jax.run import load_trained  # imports the trainer, which not everybody needs

    trained = load_trained(os.fspath(workdir))
    params, model_state = trained.variables
    return trained.task.model, {"params": params, **model_state}
