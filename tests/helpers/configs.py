"""The files of configs/ and the values that they give."""

import importlib.util
import itertools
import json
import pathlib
import types
from typing import Any

from ml_collections import ConfigDict

from halvit_jax.cli import app

CONFIGS = {path.stem: path for path in sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))}


def module(name: str) -> types.ModuleType:
    """A file of configs/, imported as the flag imports it."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS[name])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(entry: str) -> ConfigDict:
    """The config of "file" or "file:variant"."""
    name, _, variant = entry.partition(":")
    return module(name).get_config(*[variant] if variant else [])


def entries(name: str) -> list[str]:
    """All that a file of configs/ offers: its default first, then every variant."""
    groups = getattr(module(name), "VARIANTS", ())
    chosen = [",".join(filter(None, names)) for names in itertools.product(*groups)]
    return [name, *(f"{name}:{variant}" for variant in chosen[1:])]


def values(config: ConfigDict) -> dict[str, Any]:
    """All fields by their full names, as JSON has them."""
    return json.loads(json.dumps({name: config_value(config, name) for name in app.field_names(config)}))


def config_value(config: ConfigDict, name: str) -> Any:
    """The value of a field by its full name."""
    for part in name.split("."):
        config = config[part]
    return config
