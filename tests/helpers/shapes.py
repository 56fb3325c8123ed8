"""Models and their variables as shapes, of which nothing is computed, and random values of these shapes."""

import math
from typing import Any

import numpy as np
from flax import linen as nn

from halvit_jax.models import create_model
from halvit_jax.trees import map_paths, variable_shapes


def shallow(name: str) -> nn.Module:
    """The model at its own width and image size, with as few layers as have all kinds of parameters."""
    model = create_model(name)
    if hasattr(model, "depth"):
        return create_model(name, depth=getattr(model, "share", 1))
    return create_model(name, depths=tuple(getattr(model, "shares", (1,) * len(model.depths))))


def random_variables(model: nn.Module) -> Any:
    """Values that keep a signal's size, many times quicker than compiling `init`."""
    rng = np.random.default_rng(0)

    def values(path: str, shape: Any) -> np.ndarray:
        if path.endswith(("scale", "var")):
            return rng.uniform(0.5, 1.5, shape.shape).astype(np.float32)
        return (rng.standard_normal(shape.shape) / math.sqrt(math.prod(shape.shape[:-1]))).astype(np.float32)

    return map_paths(values, variable_shapes(model))
