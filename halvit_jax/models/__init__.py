"""All models by name: `FAMILIES` lists the families, `create_model` builds a model."""

import difflib
import fnmatch
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, get_origin

import jax
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


# Type of a field -> what is taken for it, in Python and in words.
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((numbers.Integral,), "a whole number"),
    float: ((numbers.Real,), "a number"),
    str: ((str,), "a text"),
    Sequence: ((list, tuple), "a list of numbers"),
}


def list_models(pattern: str = "*") -> list[str]:
    """The names for `create_model` that match a pattern, such as "pvt*", in alphabetical order."""
    return sorted(fnmatch.filter((name for family in FAMILIES for name in family.sizes), pattern))


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
        _check_value(field, value, allowed[field])
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
    near = difflib.get_close_matches(model, names, n=3, cutoff=0.0)
    raise ValueError(
        f"model.name={model!r} is unknown; did you mean {near[0]!r}, {near[1]!r} or {near[2]!r}? "
        "`python -m halvit_jax.summary` lists all"
    )


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
    if jnp.dtype(dtype).itemsize > 4 and not jax.config.jax_enable_x64:
        raise ValueError(f"dtype={dtype!r} is float32 to JAX unless jax_enable_x64 is set; give float32 or bfloat16")


def _check_value(field: str, value: Any, wanted: Any) -> None:
    kind = next((kind for kind in KINDS if wanted is kind or get_origin(wanted) is kind), None)
    if kind is not None:
        types, words = KINDS[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"model.{field}={value!r} must be {words}")
    if isinstance(value, numbers.Real) and value < 0:
        raise ValueError(f"model.{field}={value} must not be negative")
