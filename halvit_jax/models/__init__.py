"""All models by name: `FAMILIES` lists the families, `create_model` builds a model."""

import difflib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.batch_norm import norm_groups as norm_groups
from halvit_jax.models import minivit, nextvit, pvt, pvt_v2, regnet, resnet, shvit, swin, vit
from halvit_jax.models.family import Family
from halvit_jax.trees import Rules, TransferRules

FAMILIES: list[Family] = [
    vit.FAMILY,
    resnet.FAMILY,
    swin.FAMILY,
    minivit.DEIT_FAMILY,
    minivit.SWIN_FAMILY,
    regnet.FAMILY,
    shvit.FAMILY,
    pvt.FAMILY,
    pvt_v2.FAMILY,
    nextvit.FAMILY,
]


def list_models() -> list[str]:
    """The names for `create_model`, in alphabetical order."""
    return sorted(name for family in FAMILIES for name in family.sizes)


def create_model(name: str, **overrides: Any) -> nn.Module:
    """The model `name`, with any of its fields overridden, e.g. `create_model("deit_tiny", num_classes=10)`.

    An override of None keeps the value in the family's table of sizes, so a config may list unset fields.

    Raises:
        ValueError: an unknown name, an unknown field, or inconsistent fields.
    """
    family = family_of(name)
    given = {field: value for field, value in overrides.items() if value is not None}
    allowed = family.field_types
    for field, value in given.items():
        if field not in allowed:
            raise ValueError(f"model.{field}={value!r}: {name} has no such field; it has {', '.join(allowed)}")
        _check_number(field, value, allowed[field])
    if "dtype" in given:
        _check_dtype(given["dtype"])
    return family.model(**(family.sizes[name] | given))


def family_of(model: str | nn.Module) -> Family:
    """The family of a model or of a model's name; raises ValueError for an unknown one."""
    for family in FAMILIES:
        if model in family.sizes if isinstance(model, str) else type(model) is family.model:
            return family
    if not isinstance(model, str):
        raise ValueError(f"{type(model).__name__} is in none of models.FAMILIES")
    names = list_models()
    near = difflib.get_close_matches(model, names, n=1, cutoff=0.0)[0]
    raise ValueError(f"model.name={model!r} is unknown; did you mean {near!r}? All: {', '.join(names)}")


def baseline_of(name: str) -> str | None:
    """The model that `name` is derived from and compared with, or None."""
    return family_of(name).baselines.get(name)


def partition_rules(model: nn.Module) -> Rules:
    """(regex of a parameter path, mesh axis of each dimension) for every parameter of the model; first match wins."""
    return family_of(model).partition_rules


def transfer_rules(model: nn.Module) -> TransferRules:
    """(regex of a parameter path, how a loaded array is adapted there): see `convert.transfer`."""
    return family_of(model).transfer_rules


def fold(model: nn.Module, variables: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model and its variables with every batch normalisation folded, for inference; unchanged without any."""
    if "batch_stats" not in variables:
        return model, variables
    return model.clone(folded=True), family_of(model).fold(variables)


def _check_dtype(dtype: Any) -> None:
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"dtype={dtype!r} is not a floating-point type; give float32 or bfloat16")


def _check_number(field: str, value: Any, wanted: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if value < 0:
        raise ValueError(f"model.{field}={value} must not be negative")
    if wanted is int and not isinstance(value, int):
        raise ValueError(f"model.{field}={value} must be a whole number")
