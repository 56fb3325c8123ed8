"""The doors that read no workdir: summary and bench."""

import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import pytest
from helpers.processes import run_command

from halvit_jax import bench
from halvit_jax.models import create_model, family_of, list_models

ROOT = pathlib.Path(__file__).parents[2]


def run(door: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    """One process."""
    return run_command(f"halvit_jax.{door}", *arguments, code=code)


@pytest.mark.slow  # it counts the multiplications of all
def test_summary_lists_every_model() -> None:
    rows = [json.loads(line) for line in run("summary", "--json").stdout.splitlines()]
    assert [row["model"] for row in rows] == list_models()
    tiny = next(row for row in rows if row["model"] == "halvit_tiny")
    assert tiny["params"] == 11_415_400
    assert tiny["params_without_head"] == 11_030_400
    assert tiny["image_size"] == 224
    assert tiny["published"]["top1"] == 77.3


def test_summary_as_a_table() -> None:
    lines = run("summary", "halvit_tiny").stdout.splitlines()
    assert len(lines) == 2
    assert "11,415,400" in lines[1]
    assert "did you mean 'halvit_tiny'" in run("summary", "halvit_tin", code=2).stderr


def test_bench_measures_inference_and_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("deit_tiny", "halvit_tiny"):  # of one block, which compiles quickly
        sizes = family_of(name).sizes
        monkeypatch.setitem(sizes, name, sizes[name] | {"depth": 1, "image_size": 64})
    order: list[str] = []
    for what in ("infer", "train"):
        original = getattr(bench.ModelBenchmark, what)

        def spy(self: bench.ModelBenchmark, original: object = original, what: str = what) -> None:
            order.append(f"{self.name} {what}")
            original(self)  # type: ignore[operator]

        monkeypatch.setattr(bench.ModelBenchmark, what, spy)
    rows = bench.measure(["deit_tiny", "halvit_tiny"], batch=2, dtype="float32", repeats=1)
    one_round = ["deit_tiny infer", "deit_tiny train", "halvit_tiny infer", "halvit_tiny train"]
    assert order == 2 * one_round  # the models take turns
    assert [row["model"] for row in rows] == ["deit_tiny", "halvit_tiny"]
    assert rows[0]["infer_folded_images_per_s"] is None  # nothing to fold
    for row in rows:
        assert row["infer_images_per_s"] > row["train_images_per_s"] > 0
        assert row["compile_s"] > 0
    tiny = create_model("halvit_tiny")
    shapes = jax.eval_shape(lambda: tiny.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False))
    adam_bytes = 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert 0 <= rows[1]["params_and_optimizer_bytes"] - adam_bytes < 100
    assert rows[1]["train_peak_bytes"] > adam_bytes


@pytest.mark.slow
def test_bench_measures_what_folding_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = family_of("resnet18").sizes
    small = {"depths": (1, 1, 1, 1), "image_size": 32, "num_classes": 5}
    monkeypatch.setitem(sizes, "resnet18", sizes["resnet18"] | small)
    (row,) = bench.measure(["resnet18"], batch=2, dtype="float32", repeats=1)
    assert row["infer_folded_images_per_s"] > row["train_images_per_s"]


def test_bench_refuses_unknown_models() -> None:
    assert "did you mean 'deit_small'" in run("bench", "--models=deit_smal", code=2).stderr
    assert "name models with --models=a,b" in run("bench", "deit_small", code=2).stderr
    assert "--batch" in run("bench", "--batch=0", code=2).stderr
