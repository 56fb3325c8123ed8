"""A model's variables in one safetensors file: arrays under our paths, and the model's name and fields."""

import json
import os
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from halvit_jax.convert import engine, from_torch, hub, readers, shapes_of
from halvit_jax.models import create_model
from halvit_jax.trees import flatten, unflatten

EMPTY: Mapping[str, str] = types.MappingProxyType({})
FORMAT = "halvit_jax"  # marks the files that are ours
DETECTOR = "detector"  # in the metadata: the name of a detector, whose fields are in the config of its run


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
    """Write the variables of the model `name` with these overrides; `metadata` is for other readers.

    Raises:
        ValueError: variables of another model, by path, or fields that are not JSON.
    """
    arrays = flatten(jax.tree.map(np.asarray, dict(variables)))
    engine.check_tree(name, arrays, shapes_of(create_model(name, **overrides)))
    fields = {field: value for field, value in overrides.items() if value is not None}
    try:
        text = json.dumps(fields)
    except TypeError as error:
        raise ValueError(f"the fields {fields} of {name} cannot be written as JSON: {error}") from error
    readers.write(path, arrays, {**metadata, "format": FORMAT, "model": name, "fields": text})


def save_detector(
    path: str | os.PathLike[str], name: str, variables: Mapping[str, Any], *, metadata: Mapping[str, str]
) -> None:
    """Write the variables of a detector; `metadata` hold the config of its run, which `load_trained` builds it from."""
    arrays = flatten(jax.tree.map(np.asarray, dict(variables)))
    readers.write(path, arrays, {**metadata, "format": FORMAT, DETECTOR: name})


def load(path: str | os.PathLike[str]) -> StoredModel:
    """Read a file of `save`; raises ValueError for any other."""
    stored = from_weights(readers.read(path))
    if stored is None:
        raise ValueError(f"{path} is not a file of halvit_jax; python -m halvit_jax.convert makes one from PyTorch's")
    return stored


def load_any(path: str, weights: readers.Weights, name: str | None, fields: Mapping[str, Any]) -> StoredModel:
    """The model and variables in a weight file's content; a PyTorch state is one of the model `name` with `fields`.

    Raises:
        ValueError: no model is named, the metadata name another one, or the arrays do not fit.
    """
    given = {field: value for field, value in fields.items() if value is not None}
    stored = from_weights(weights)
    if stored is None:
        if name is None and hub.is_source(path):
            name, published = hub.model_of(path)
            given = published | given
        if name is None:
            raise ValueError(f"{path} does not name its model; give its name (--model=NAME)")
        return StoredModel(name, given, from_torch(name, weights.arrays, **given))
    if name not in (None, stored.name):
        raise ValueError(f"{path} is of {stored.name}, not of {name}")
    fields = stored.fields | given
    engine.check_tree(stored.name, flatten(stored.variables), shapes_of(create_model(stored.name, **fields)))
    return stored._replace(fields=fields)


def from_weights(weights: readers.Weights) -> StoredModel | None:
    """The variables in the content of a file of `save`; None for any other.

    Raises:
        ValueError: invalid metadata, arrays that do not fit the model, or a detector.
    """
    metadata = weights.metadata
    if metadata.get("format") != FORMAT:
        return None
    if DETECTOR in metadata:
        raise ValueError(
            f"the file is of the detector {metadata[DETECTOR]!r}, and no model of its own; halvit_jax.load, "
            "load_predictor and init_from of task.name='detection' read it"
        )
    name, fields = metadata.get("model", ""), _fields(metadata.get("fields", ""))
    if fields is None or _blocks(fields) > len(weights.arrays):  # building a model of a billion blocks would not end
        raise ValueError(f"the fields of the model {name!r} are invalid: {metadata.get('fields')!r:.300}")
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
    """The number of blocks of a model with these fields; infinity if it is not a number."""
    depths = fields.get("depths") or []
    counts = [fields.get("depth") or 0, *(depths if isinstance(depths, list) else [depths])]
    return sum(counts) if all(isinstance(count, int) for count in counts) else float("inf")
