"""The table of all families: its entries, and one trained, weighed, timed and drawn."""

import json
import pathlib
import sys
from typing import Any

import pytest

from halvit_jax import main
from halvit_jax.analysis import family_benchmark
from halvit_jax.config import validate
from halvit_jax.experiment.workdir import RESULT_FILE
from halvit_jax.models import create_model

ROW = {"params": 1000, "bytes_on_disk": 4096, "optimizer_bytes": 8192, "gmacs": 0.004, "latency_ms": 0.5}


def test_entries_differ_in_the_model_alone() -> None:
    def recipe(label: str) -> dict[str, Any]:
        config = family_benchmark.recipe(label, steps=7, seed=3)
        validate(config)
        create_model(**config.model)
        rest = {name: value for name, value in config.to_dict().items() if name != "model"}
        rest["optim"].pop("no_decay")  # which names parameters
        return rest

    assert len({json.dumps(recipe(label), sort_keys=True) for label in family_benchmark.RUNS}) == 1
    assert (recipe("ViT")["seed"], recipe("ViT")["total_steps"]) == (3, 7)


@pytest.mark.slow
def test_a_family_is_trained_once_and_weighed_as_it_is_deployed(
    digits_dir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = family_benchmark.RUNS["ViT hc"]

    def small() -> Any:
        config = entry()
        config.data.data_dir = str(digits_dir)
        config.data.virtual_shards = 8
        config.model.depth, config.model.width, config.model.num_heads = 1, 8, 2
        return config

    monkeypatch.setitem(family_benchmark.RUNS, "ViT hc", small)
    (row,) = family_benchmark.measure(["ViT hc"], tmp_path, train=main.run_experiment, seeds=1, steps=5, repeats=1)
    config = family_benchmark.recipe("ViT hc", steps=5, seed=0)
    branches = 2 * (32 * 4 + 4 * 8 + 2 * (4 + 8))  # of two products and norms each; deployed: one product each, a bias
    assert row["trained_params"] - row["params"] == branches - (32 * 4 + 4 * 8 + 8)
    assert row["optimizer_bytes"] == pytest.approx(8 * row["trained_params"], abs=64)  # AdamW's two moments, counters
    assert 0 < row["bytes_on_disk"] - 4 * row["params"] < 4096  # names and shapes
    assert row["top1_of_seeds"] == [row["top1"]]
    assert row["latency_ms"] > 0
    assert config.model.ffn_rank is None  # the model's own, as in the table of sizes

    result = tmp_path / "vit_hc_5_0" / RESULT_FILE
    changed = json.loads(result.read_text()) | {"eval": {"top1": 0.25, "loss": 1.0}}
    result.write_text(json.dumps(changed))
    (again,) = family_benchmark.measure(["ViT hc"], tmp_path, train=main.run_experiment, seeds=1, steps=5, repeats=1)
    assert again["top1"] == 25.0  # read, not trained anew


def test_rows_become_a_table_and_a_plot(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ROW | {"family": name, "top1": 98.5, "top1_of_seeds": [98.0, 99.0]} for name in ("ViT", "HaLViT")]
    lines = family_benchmark.table(rows).splitlines()
    assert lines[1].split() == ["ViT", "1,000", "4", "8", "4.00", "0.50", "98.50", "98.00,", "99.00"]
    picture = tmp_path / "family_benchmark.png"
    family_benchmark.plot(rows, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        family_benchmark.plot(rows, picture)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="--families has 'VIT', which is not one of ViT, HaLViT"):
        family_benchmark.validate_labels(["ViT", "VIT"])


def test_by_default_baselines_stand_beside_what_saves_weights() -> None:
    assert set(family_benchmark.DEFAULT) < set(family_benchmark.RUNS)
    assert {"ViT", "HaLViT", "ViT hc", "Mini-DeiT", "SHViT", "PVT hc", "Next-ViT hc"} < set(family_benchmark.DEFAULT)
