"""Narrow teachers to be halved."""

from typing import Any, NamedTuple

from flax import linen as nn
from helpers.shapes import random_variables

from halvit_jax import create_model, from_torch, to_torch

SHAPE = {"width": 16, "depth": 2, "num_heads": 2, "image_size": 8, "patch_size": 2, "num_classes": 10}


class Teacher(NamedTuple):
    """A model and its variables."""

    model: nn.Module
    variables: dict[str, Any]


def written_out(**fields: Any) -> Teacher:
    """A random HaLViT as the plain DeiT with the same logits."""
    fields = SHAPE | fields
    state = to_torch("halvit_tiny", random_variables(create_model("halvit_tiny", **fields)), as_deit=True, **fields)
    fields.pop("attention_bias", None)
    return Teacher(create_model("deit_small", **fields), from_torch("deit_small", state, **fields))


def random_deit(**fields: Any) -> Teacher:
    """A random DeiT."""
    model = create_model("deit_small", **SHAPE | fields)
    return Teacher(model, random_variables(model))
