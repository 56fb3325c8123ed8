"""Every run with a published accuracy against `tests/golden/recipes.json`, the values and the files that state them.

A value is [value, source]. A recipe takes those of its base, a run those of its recipe. `peak` is the learning rate at
the batch of the run; `model.x` is read from the model, and null where it has no such field.
"""

import ast
import json
import pathlib
from typing import Any

import pytest
from helpers.configs import CONFIGS, config_value, load, values
from ml_collections import ConfigDict

from halvit_jax.config import default_config
from halvit_jax.models import FAMILIES, create_model

TABLE = json.loads((pathlib.Path(__file__).parents[1] / "golden/recipes.json").read_text())
RUNS: dict[str, dict[str, Any]] = TABLE["runs"]
DEFAULTS = values(default_config())
# What `peak`, `batch_size` and `model` stand for; and what decides how often something happens, not what is learned.
COVERED = (
    "optim.learning_rate",
    "optim.base_batch_size",
    "optim.scaling",
    "recipe_batch_size",
    "model.name",
    "published_top1",
)


def published(entry: str) -> dict[str, Any]:
    """{field: value} of a run, without the sources."""
    run = RUNS[entry]
    found, name = run["values"], run["recipe"]
    while name:
        recipe = TABLE["recipes"][name]
        found, name = recipe["values"] | found, recipe.get("base", "")
    return {"model.name": run["model"]} | {field: value for field, (value, _) in found.items()}


def deviations(entry: str, config: ConfigDict) -> list[str]:
    """What differs from the published values, and what the config sets that the table does not have."""
    model, wanted, own = create_model(**config.model), published(entry), values(config)
    found = []
    for field, value in wanted.items():
        if field == "peak":
            has = config.optim.learning_rate * config.batch_size / config.optim.base_batch_size
            fits = config.optim.scaling == "linear" and has == pytest.approx(value)
        else:
            tree, _, name = field.partition(".")
            has = getattr(model, name, None) if tree == "model" and name != "name" else config_value(config, field)
            fits = json.loads(json.dumps(has)) == value
        found += [] if fits else [f"{entry}: {field} is {has!r}, published {value!r}"]
    set_here = {field for field, value in own.items() if value != DEFAULTS[field]} - {*wanted, *COVERED}
    return found + [f"{entry}: {field} is set to {own[field]!r} without a source" for field in sorted(set_here)]


@pytest.mark.parametrize("entry", RUNS)
def test_a_run_has_the_published_values_and_no_others(entry: str) -> None:
    config = load(entry)
    assert deviations(entry, config) == []
    assert config.recipe_batch_size == config.batch_size
    assert config.published_top1 == RUNS[entry].get("top1", [0.0])[0]


def test_a_wrong_value_is_named() -> None:
    config = load("swin:base,384")
    config.model.window_size = 7
    config.optim.floor = 1e-5
    config.data.shift = 1
    assert deviations("swin:base,384", config) == [
        "swin:base,384: optim.floor is 1e-05, published 4e-07",
        "swin:base,384: model.window_size is 7, published 12",
        "swin:base,384: data.shift is set to 1 without a source",
    ]


def test_every_value_names_a_source() -> None:
    tables = [*TABLE["recipes"].values(), *RUNS.values()]
    pairs = [pair for table in tables for pair in table["values"].values()]
    pairs += [run["top1"] for run in RUNS.values() if "top1" in run]
    assert {source.partition("/")[0] for _, source in pairs} == set(TABLE["sources"])


def test_every_published_accuracy_has_a_run_whose_header_states_it() -> None:
    accuracies = {(run["model"], run["top1"][0]) for run in RUNS.values() if "top1" in run}
    for family in FAMILIES:
        for name, result in family.published.items():
            assert (name, result.top1) in accuracies, f"{name}: no recipe of configs/ leads to {result.top1}"
    for entry, run in RUNS.items():
        header = ast.get_docstring(ast.parse(CONFIGS[entry.partition(":")[0]].read_text()))
        assert "top1" not in run or f"{run['top1'][0]}" in str(header), f"{entry}: {run['top1'][0]}"
