"""halvit_jax: vision models with half of the weights, and the trainer that makes them, in JAX.

model = halvit_jax.create_model("halvit_tiny", num_classes=10)   # a flax.linen.Module
variables = model.init(jax.random.key(0), images, train=False)   # images [b, h, w, 3], normalised, float32
logits = model.apply(variables, images, train=False)
variables = halvit_jax.from_torch("deit_tiny", state)            # state: {official PyTorch name: numpy array}
state = halvit_jax.to_torch("deit_tiny", variables)
model, variables = halvit_jax.load("runs/halvit_digits")         # the trained model of a run
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from halvit_jax.models import create_model, list_models

__all__ = ["create_model", "from_torch", "list_models", "load", "to_torch"]


def from_torch(name: str, state: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """The variables of the model `name` from its PyTorch state: {official name: array}. See `halvit_jax.convert`.

    Raises:
        ValueError: every ambiguous, missing, left-over and misshapen entry, by name.
    """
    from halvit_jax import convert  # builds its tables of names, which not everybody needs

    return convert.from_torch(name, state, **overrides)


def to_torch(
    name: str, variables: Mapping[str, Any], *, as_deit: bool = False, **overrides: Any
) -> dict[str, np.ndarray]:
    """The PyTorch state of the model `name`; with `as_deit`, a HaLViT as the plain DeiT that gives the same logits.

    Raises:
        ValueError: every missing, left-over and misshapen array, by path.
    """
    from halvit_jax import convert

    return convert.to_torch(name, variables, as_deit=as_deit, **overrides)


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
