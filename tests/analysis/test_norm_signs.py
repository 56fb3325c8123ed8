"""Runs that differ in the signs of some scales alone."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from halvit_jax import load
from halvit_jax.analysis import norm_signs
from halvit_jax.config import validate
from halvit_jax.experiment.workdir import RESULT_FILE
from halvit_jax.trees import flatten


def test_starts_differ_in_the_signs_of_feed_forward_norms_alone(tmp_path: pathlib.Path) -> None:
    found = {}
    for row in ("tied", "tied, half at -1", "tied, all at -1"):
        config = norm_signs.recipe(row, steps=440, seed=1, start=tmp_path / "start.safetensors")
        config.model.width, config.model.depth, config.model.num_heads = 8, 1, 2
        validate(config)
        assert (config.seed, config.total_steps, config.optim.warmup_epochs) == (1, 440, 5.0)
        norm_signs.write_start(row, config)
        found[row] = flatten(load(config.init_from)[1])
    scale = "params/block0/ffn_norm/scale"
    assert [list(np.unique(each.pop(scale))) for each in found.values()] == [[1.0], [-1.0, 1.0], [-1.0]]
    for path, array in found["tied"].items():
        assert all(np.array_equal(each[path], array) for each in found.values())


def test_finished_runs_are_not_repeated(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def train(config: Any, folder: pathlib.Path) -> None:
        made.append(folder.name)
        folder.mkdir()
        (folder / RESULT_FILE).write_text(json.dumps({"eval": {"top1": 0.5 + 0.2 * config.seed}}))

    monkeypatch.setattr(norm_signs, "write_start", lambda row, config: None)
    both = [norm_signs.measure(tmp_path, train=train, seeds=2, steps=7) for _ in range(2)]
    assert both[0] == both[1]
    assert len(made) == len(set(made)) == 8
    assert made[2] == "tied_half_at_-1_7_0"
    assert both[0][1] == {"row": "tied", "top1": 60.0, "deviation": 14.14, "top1_of_seeds": [50.0, 70.0]}
    assert norm_signs.table(both[0]).splitlines()[2].split() == ["tied", "60.00", "14.14", "50.00,", "70.00"]
