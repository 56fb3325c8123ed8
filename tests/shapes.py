"""Models and their parameters as shapes, of which nothing is computed."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.models import create_model


def shallow(name: str) -> nn.Module:
    """The model at its own width and image size, with as few layers as have all kinds of parameters."""
    model = create_model(name)
    if hasattr(model, "depth"):
        return create_model(name, depth=getattr(model, "share", 1))
    return create_model(name, depths=tuple(getattr(model, "shares", (1,) * len(model.depths))))


def shapes_of(model: nn.Module) -> Any:
    """A model's parameters as a tree of shapes."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
