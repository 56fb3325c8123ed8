"""The command that lists the models."""

import json

import pytest
from helpers.processes import run_command

from halvit_jax.models import list_models


@pytest.mark.slow  # it counts the multiplications of all
def test_summary_lists_every_model() -> None:
    rows = [json.loads(line) for line in run_command("halvit_jax.summary", "--json").stdout.splitlines()]
    assert [row["model"] for row in rows] == list_models()
    tiny = next(row for row in rows if row["model"] == "halvit_tiny")
    assert tiny["params"] == 11_415_400
    assert tiny["params_without_head"] == 11_030_400
    assert tiny["image_size"] == 224
    assert tiny["published"]["top1"] == 77.3


def test_summary_as_a_table() -> None:
    lines = run_command("halvit_jax.summary", "halvit_tiny").stdout.splitlines()
    assert len(lines) == 2
    assert "11,415,400" in lines[1]
    assert "did you mean 'halvit_tiny'" in run_command("halvit_jax.summary", "halvit_tin", code=2).stderr
