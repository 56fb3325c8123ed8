"""timm's names of a state are renamed to the official ones, all of them."""

import json

import pytest
from helpers.official import GOLDEN, official_shapes

from halvit_jax.convert.timm import official_names
from halvit_jax.models import create_model

STATES = json.loads((GOLDEN / "timm_names.json").read_text())["states"]


@pytest.mark.parametrize("name", STATES)
def test_every_name_of_timm_has_its_official_name_and_shape(name: str) -> None:
    renamed = official_names(create_model(name), STATES[name])
    wanted = {entry: list(shape) for entry, shape in official_shapes(name).items() if "num_batches" not in entry}
    assert renamed == wanted
    assert renamed.keys() != STATES[name].keys()


@pytest.mark.parametrize("name", [*STATES, "deit_tiny", "resnet18"])
def test_official_names_stay(name: str) -> None:
    official = official_shapes(name)
    assert official_names(create_model(name), official) == official
