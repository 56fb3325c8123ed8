"""Trained models loaded from their workdirs."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from helpers.runs import Finished

import halvit_jax


def test_the_trained_model_can_be_loaded(finished: tuple[pathlib.Path, dict[str, Any]]) -> None:
    workdir, result = finished
    model, variables = halvit_jax.load(workdir)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == result["params"]
    assert model.apply(variables, np.zeros((2, 8, 8, 3), np.float32), train=False).shape == (2, 10)


def test_a_workdir_knows_its_model(finished: Finished) -> None:
    with pytest.raises(ValueError, match="is the workdir of a run"):
        halvit_jax.load(finished[0], "halvit_tiny")
