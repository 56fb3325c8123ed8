"""The command that measures models."""

import jax
import jax.numpy as jnp
import pytest
from helpers.processes import run_command
from ml_collections import ConfigDict

from halvit_jax import bench
from halvit_jax.models import create_model, family_of


def _configs(*names: str) -> dict[str, ConfigDict]:
    return {name: bench.config_of(name, batch=2, dtype="float32") for name in names}


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
    rows = bench.measure(_configs("deit_tiny", "halvit_tiny"), repeats=1)
    one_round = ["deit_tiny infer", "deit_tiny train", "halvit_tiny infer", "halvit_tiny train"]
    assert order == 2 * one_round  # the models take turns
    assert [row["model"] for row in rows] == ["deit_tiny", "halvit_tiny"]
    assert rows[0]["infer_folded_images_per_s"] is None  # nothing to fold
    for row in rows:
        assert row["infer_images_per_s"] > 0
        assert row["train_images_per_s"] > 0
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
    (row,) = bench.measure(_configs("resnet18"), repeats=1)
    assert row["infer_folded_images_per_s"] > 0


def test_bench_refuses_unknown_models() -> None:
    assert "did you mean 'deit_small'" in run_command("halvit_jax.bench", "--models=deit_smal", code=2).stderr
    assert "name models with --models=a,b" in run_command("halvit_jax.bench", "deit_small", code=2).stderr
    assert "--against=torch is for --what=detect" in run_command("halvit_jax.bench", "--against=torch", code=2).stderr
    assert (
        "--what=detect needs a --config of"
        in run_command("halvit_jax.bench", "--what=detect", "--models=deit_tiny", code=2).stderr
    )
    assert "--batch" in run_command("halvit_jax.bench", "--batch=0", code=2).stderr
