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
from halvit_jax.convert import readers
from halvit_jax.experiment.trained import at_size, load_trained, save_trained
from halvit_jax.experiment.workdir import CONFIG_FILE
from halvit_jax.trees import sha256


def test_the_trained_model_can_be_loaded(finished: tuple[pathlib.Path, dict[str, Any]]) -> None:
    workdir, result = finished
    model, variables = halvit_jax.load(workdir)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == result["params"]
    assert model.apply(variables, np.zeros((2, 8, 8, 3), np.float32), train=False).shape == (2, 10)


def test_a_workdir_knows_its_model(finished: Finished) -> None:
    with pytest.raises(ValueError, match="is the workdir of a run"):
        halvit_jax.load(finished[0], "halvit_tiny")


def test_a_file_of_a_trained_model_serves_as_its_workdir(done: pathlib.Path, tmp_path: pathlib.Path) -> None:
    trained = load_trained(done)
    path = tmp_path / "trained.safetensors"
    save_trained(path, trained)
    again = load_trained(path)
    assert again.info == trained.info
    assert again.config.to_dict() == trained.config.to_dict()
    assert sha256(again.model_variables) == sha256(trained.model_variables)


def test_a_file_without_its_config_is_refused(done: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path, arrays = tmp_path / "weights.safetensors", {"a": np.zeros(1, np.float32)}
    readers.write(path, arrays, {})
    with pytest.raises(ValueError, match="has no config of a run inside; give the workdir of one"):
        load_trained(path)
    readers.write(path, arrays, {"config": (done / "config.json").read_text()})
    with pytest.raises(ValueError, match="is no file of halvit_jax, although it has a config inside"):
        load_trained(path)


def test_a_workdir_without_a_checkpoint_is_refused(finished: Finished, tmp_path: pathlib.Path) -> None:
    shutil.copy(finished[0] / CONFIG_FILE, tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} has no checkpoint yet")):
        halvit_jax.load(tmp_path)


def test_an_unknown_function_of_the_package_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'halvit_jax' has no attribute 'fit'"):
        _ = halvit_jax.fit


def test_a_detector_has_canvases_and_not_one_size(done: pathlib.Path) -> None:
    trained = load_trained(done)
    trained.config.task.name = "detection"
    with pytest.raises(ValueError, match=r"image_size=64: a detector takes images of any size, on instances.canvases"):
        at_size(trained, 64)
