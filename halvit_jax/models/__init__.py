"""All models by name: `MODELS` says which class with which fields, `create_model` builds one."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers import conv, ffn
from halvit_jax.models import minivit, nextvit, pvt, regnet, resnet, shvit, swin, vit
from halvit_jax.trees import Rules, TransferRules


class Family(NamedTuple):
    """What belongs to a model class: {name: fields} of its models, and the rules over the paths of its parameters."""

    sizes: dict[str, dict[str, Any]]
    partition_rules: Rules
    transfer_rules: TransferRules
    fold: Callable[[Mapping[str, Any]], dict[str, Any]] = conv.fold  # of its variables


FAMILIES: dict[type[nn.Module], Family] = {
    vit.VisionTransformer: Family(vit.SIZES, vit.PARTITION_RULES, vit.TRANSFER_RULES, ffn.fold),
    resnet.ResNet: Family(resnet.SIZES, resnet.PARTITION_RULES, resnet.TRANSFER_RULES),
    swin.SwinTransformer: Family(swin.SIZES, swin.PARTITION_RULES, swin.TRANSFER_RULES),
    minivit.MiniDeit: Family(minivit.DEIT_SIZES, minivit.PARTITION_RULES, vit.TRANSFER_RULES),
    minivit.MiniSwin: Family(minivit.SWIN_SIZES, minivit.PARTITION_RULES, swin.TRANSFER_RULES),
    regnet.RegNet: Family(regnet.SIZES, regnet.PARTITION_RULES, regnet.TRANSFER_RULES),
    shvit.SHViT: Family(shvit.SIZES, shvit.PARTITION_RULES, shvit.TRANSFER_RULES, shvit.fold),
    pvt.PVT: Family(pvt.SIZES, pvt.PARTITION_RULES, pvt.TRANSFER_RULES, ffn.fold),
    pvt.PVTv2: Family(pvt.V2_SIZES, pvt.PARTITION_RULES, pvt.TRANSFER_RULES, ffn.fold),
    nextvit.NextViT: Family(nextvit.SIZES, nextvit.PARTITION_RULES, nextvit.TRANSFER_RULES, ffn.fold),
}
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    name: (model, size) for model, family in FAMILIES.items() for name, size in family.sizes.items()
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
    return FAMILIES[type(model)].partition_rules


def transfer_rules(model: nn.Module) -> TransferRules:
    """(regex of a path, what may differ there in weights that the model begins with): see `convert.transfer`."""
    return FAMILIES[type(model)].transfer_rules


def fold(model: nn.Module, variables: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model and its variables with every batch normalisation folded, for inference; one without any as it is."""
    if "batch_stats" not in variables:
        return model, variables
    return model.clone(folded=True), FAMILIES[type(model)].fold(variables)


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
