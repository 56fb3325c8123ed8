"""Trained models loaded from their workdirs."""

import pathlib
import re
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from helpers.runs import Finished

import halvit_jax
from halvit_jax.experiment.workdir import CONFIG_FILE


def test_the_trained_model_can_be_loaded(finished: tuple[pathlib.Path, dict[str, Any]]) -> None:
    workdir, result = finished
    model, variables = halvit_jax.load(workdir)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == result["params"]
    assert model.apply(variables, np.zeros((2, 8, 8, 3), np.float32), train=False).shape == (2, 10)


def test_a_workdir_knows_its_model(finished: Finished) -> None:
    with pytest.raises(ValueError, match="is the workdir of a run"):
        halvit_jax.load(finished[0], "halvit_tiny")


def test_a_workdir_without_a_checkpoint_is_refused(finished: Finished, tmp_path: pathlib.Path) -> None:
    shutil.copy(finished[0] / CONFIG_FILE, tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} has no checkpoint yet")):
        halvit_jax.load(tmp_path)


def test_an_unknown_function_of_the_package_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'halvit_jax' has no attribute 'fit'"):
        _ = halvit_jax.fit
