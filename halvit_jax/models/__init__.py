"""All models by name: `MODELS` says which class with which fields, `create_model` builds one."""

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers import conv
from halvit_jax.models import resnet, shvit, vit

Rules = tuple[tuple[str, tuple[tuple[str, ...] | str | None, ...]], ...]
TransferRules = tuple[tuple[str, str], ...]
FAMILIES: dict[type[nn.Module], types.ModuleType] = {
    vit.VisionTransformer: vit,
    resnet.ResNet: resnet,
    shvit.SHViT: shvit,
}
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    name: (model, size) for model, family in FAMILIES.items() for name, size in family.SIZES.items()
}


def list_models() -> list[str]:
    """The names `create_model` knows, in alphabetical order."""
    return sorted(MODELS)


def create_model(name: str, **overrides: Any) -> nn.Module:
    """The model `name`, with any of its fields overridden, e.g. `create_model("deit_tiny", num_classes=10)`.

    An override of None means what the table of sizes says, so a config may list fields without setting them.

    Raises:
        ValueError: an unknown name (the nearest one is offered), a field the model does not have, or fields that do
            not fit each other.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)[0]
        raise ValueError(f"model.name={name!r} is unknown; did you mean {near!r}? All: {', '.join(list_models())}")
    family, size = MODELS[name]
    given = {field: value for field, value in overrides.items() if value is not None}
    allowed = fields_of(family)
    for field, value in given.items():
        if field not in allowed:
            raise ValueError(f"model.{field}={value!r}: {name} has no such field; it has {', '.join(allowed)}")
        _check_number(field, value, allowed[field])
    if "dtype" in given:
        _check_dtype(given["dtype"])
    return family(**(size | given))


def partition_rules(model: nn.Module) -> Rules:
    """(regex of a parameter path, mesh axis of each dimension) for every parameter of the model; first match wins."""
    return FAMILIES[type(model)].PARTITION_RULES


def transfer_rules(model: nn.Module) -> TransferRules:
    """(regex of a path, what may differ there in weights that the model begins with): see `convert.transfer`."""
    return FAMILIES[type(model)].TRANSFER_RULES


def fold(model: nn.Module, variables: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model and its variables with every batch normalisation folded, for inference; one without any as it is."""
    if "batch_stats" not in variables:
        return model, variables
    # A family that can fold more than norms into the convolutions before them has a `fold` of its own.
    family = FAMILIES[type(model)]
    return model.clone(folded=True), getattr(family, "fold", conv.fold)(variables)


def fields_of(family: type[nn.Module]) -> dict[str, Any]:
    """A model class's own fields: {name: type}."""
    return {f.name: f.type for f in dataclasses.fields(family) if f.name not in ("parent", "name")}


def _check_dtype(dtype: Any) -> None:
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"dtype={dtype!r} is no type of floating-point numbers; give float32 or bfloat16")


def _check_number(field: str, value: Any, wanted: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if value < 0:
        raise ValueError(f"model.{field}={value} must not be negative")
    if wanted is int and not isinstance(value, int):
        raise ValueError(f"model.{field}={value} must be a whole number")
