"""A model's variables in one safetensors file: arrays under our paths, the model's name and fields beside them."""

import json
import os
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from halvit_jax.convert import engine, from_torch, readers, shapes_of
from halvit_jax.models import create_model
from halvit_jax.trees import flatten, unflatten

EMPTY: Mapping[str, str] = types.MappingProxyType({})
FORMAT = "halvit_jax"  # marks the files that are ours


class StoredModel(NamedTuple):
    """The content of a weight file: a model's name, fields and variables."""

    name: str
    fields: dict[str, Any]  # the overrides given to `create_model`
    variables: dict[str, Any]


def save(
    path: str | os.PathLike[str],
    name: str,
    variables: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] = EMPTY,
    **overrides: Any,
) -> None:
    """Write the variables of the model `name` with these overrides; `metadata` is kept beside them, for other readers.

    Raises:
        ValueError: variables that are not this model's, by path, or fields that JSON cannot hold.
    """
    arrays = flatten(jax.tree.map(np.asarray, dict(variables)))
    engine.check_tree(name, arrays, shapes_of(create_model(name, **overrides)))
    fields = {field: value for field, value in overrides.items() if value is not None}
    try:
        text = json.dumps(fields)
    except TypeError as error:
        raise ValueError(f"the fields {fields} of {name} cannot be written as JSON: {error}") from error
    readers.write(path, arrays, {**metadata, "format": FORMAT, "model": name, "fields": text})


def load(path: str | os.PathLike[str]) -> StoredModel:
    """Read what `save` wrote.

    Raises:
        ValueError: not such a file, or one whose arrays are not its model's.
    """
    native = from_weights(readers.read(path))
    if native is None:
        raise ValueError(f"{path} is no file of halvit_jax; python -m halvit_jax.convert makes one of PyTorch's")
    return native


def load_any(path: str, weights: readers.Weights, name: str | None, fields: Mapping[str, Any]) -> StoredModel:
    """The variables in a weight file's content: of the model it says, or, of a PyTorch state, of the model `name`.

    Raises:
        ValueError: no model is named, or the file knows that it is of another one or of other fields; what converting
            refuses.
    """
    given = {field: value for field, value in fields.items() if value is not None}
    known = from_weights(weights)
    if known is None:
        if name is None:
            raise ValueError(f"{path} does not say which model it is of; name it (--model=NAME)")
        return StoredModel(name, given, from_torch(name, weights.arrays, **given))
    if name not in (None, known.name):
        raise ValueError(f"{path} is of {known.name}, not of {name}")
    fields = known.fields | given
    engine.check_tree(known.name, flatten(known.variables), shapes_of(create_model(known.name, **fields)))
    return known._replace(fields=fields)


def from_weights(weights: readers.Weights) -> StoredModel | None:
    """The variables in the content of a file; None where it is not such a file.

    Raises:
        ValueError: its description cannot be read, or its arrays are not its model's.
    """
    described = weights.metadata
    if described.get("format") != FORMAT:
        return None
    name, fields = described.get("model", ""), _fields(described.get("fields", ""))
    if fields is None or _blocks(fields) > len(weights.arrays):  # a model of a billion blocks takes forever to build
        raise ValueError(f"the fields of the model {name!r} cannot be: {described.get('fields')!r:.300}")
    try:
        wanted = shapes_of(create_model(name, **fields))
    except Exception as error:  # fields of wrong types may end in nearly any error
        raise ValueError(f"the model {name!r} with the fields {fields} cannot be built: {error}") from error
    engine.check_tree(name, weights.arrays, wanted)
    return StoredModel(name, fields, unflatten(weights.arrays))


def _fields(text: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _blocks(fields: dict[str, Any]) -> float:
    """The number of blocks these fields ask for; infinity where that is no number."""
    depths = fields.get("depths") or []
    counts = [fields.get("depth") or 0, *(depths if isinstance(depths, list) else [depths])]
    return sum(counts) if all(isinstance(count, int) for count in counts) else float("inf")
