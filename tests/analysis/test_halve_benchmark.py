"""The table of halving: its cells, what is kept between calls, and the picture."""

import json
import pathlib
import sys
from typing import Any

import pytest

from halvit_jax.analysis import halve_benchmark
from halvit_jax.config import validate
from halvit_jax.experiment.workdir import RESULT_FILE


def test_cells_differ_in_task_start_and_length_alone() -> None:
    paths = {"teacher": pathlib.Path("t"), "halved": pathlib.Path("h.safetensors")}
    for row in halve_benchmark.ROWS:
        config = halve_benchmark.recipe(row, steps=440, seed=2, **paths)
        validate(config)
        assert (config.seed, config.total_steps, config.optim.warmup_epochs) == (2, 440, 5.0)
        assert config.init_from == ("h.safetensors" if "halved" in row else "")
        assert config.teacher.init_from == ("t" if "distilled" in row else "")
        assert config.model.name == "halvit_tiny"


def test_finished_cells_are_not_repeated(tmp_path: pathlib.Path) -> None:
    made: list[str] = []

    def train(config: Any, folder: pathlib.Path) -> None:
        made.append(folder.name)
        folder.mkdir()
        (folder / RESULT_FILE).write_text(json.dumps({"eval": {"top1": 0.5 + 0.1 * config.seed}}))

    def halve(config: Any, out: pathlib.Path) -> dict[str, Any]:
        made.append(out.name)
        return {"top1_before": 0.99, "top1_after": 0.9 if config.model.ffn == "dense" else 0.8}

    both = [halve_benchmark.measure(tmp_path, train=train, halve=halve, seeds=2, steps=(1, 2)) for _ in range(2)]
    assert both[0] == both[1]
    assert len(made) == len(set(made)) == 1 + 2 * (2 + 4 * 2)
    assert made[:3] == ["teacher", "halved_attention_0.safetensors", "halved_both_0.safetensors"]
    rows = {(row["row"], row["steps"]): row for row in both[0]}
    assert rows["teacher", 0]["top1"] == 99.0
    assert rows["halved, attention tied", 0]["top1_of_seeds"] == [90.0, 90.0]
    assert rows["halved, both tied", 0]["top1"] == 80.0
    assert rows["scratch, labels", 2]["top1_of_seeds"] == [50.0, 60.0]
    # A fit's steps: 3 x 2 d f x 512 tokens x 1,500 x 4 layers, against 4 forwards of 128 images of 7.76 million.
    assert rows["halved, both tied", 0]["soft_steps"] == pytest.approx(4 + 6 * 96 * 384 * 512 * 6000 / 3.973e9, abs=1)
    assert rows["scratch, distilled", 2]["soft_steps"] == 2
    assert rows["scratch, labels", 2]["soft_steps"] == 1.5
    assert rows["halved, labels", 2]["soft_steps"] == pytest.approx(1.5 + rows["halved, both tied", 0]["soft_steps"])
    lines = halve_benchmark.table(both[0]).splitlines()
    assert lines[4].split() == ["scratch,", "labels", "1", "55.00", "50.00,", "60.00", "1"]


def test_rows_become_a_picture(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["teacher", "halved, attention tied", "halved, both tied", "scratch, labels", "halved, distilled"]
    rows = [{"row": name, "steps": 9, "top1": 98.5, "top1_of_seeds": [98.0, 99.0], "soft_steps": 9} for name in names]
    picture = tmp_path / "halve.svg"
    halve_benchmark.plot(rows, picture)
    assert "<svg" in picture.read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        halve_benchmark.plot(rows, picture)
