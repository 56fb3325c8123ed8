"""What a resumption with another config is answered."""

import json
import pathlib
from typing import Any

import pytest
from helpers.runs import tiny

from halvit_jax.experiment import resume


def config_of(digits_dir: pathlib.Path, **changes: Any) -> Any:
    return tiny(digits_dir, **{"loop.eval_every": 8} | changes)


def test_the_same_config_has_no_changes(digits_dir: pathlib.Path, done: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert resume.check_changes(done, config_of(digits_dir), allowed=False) == []
    assert resume.check_changes(tmp_path, config_of(digits_dir, seed=3), allowed=False) == []  # nothing was trained


@pytest.mark.parametrize(
    ("field", "value", "before"),
    [
        ("optim.learning_rate", 0.01, "0.003"),
        ("seed", 7, "0"),
        ("total_steps", 4, "8"),
        ("batch_size", 64, "32"),
        ("optim.clip_norm", 1.0, "0.0"),
        ("data.train_split", "test", "'train'"),
        ("model.width", 64, "32"),
        ("loop.ema_decay", 0.0, "0.99"),
    ],
)
def test_a_field_that_changes_the_run_is_refused_unless_it_is_allowed(
    field: str, value: Any, before: str, digits_dir: pathlib.Path, done: pathlib.Path
) -> None:
    config = config_of(digits_dir, **{field: value})
    with pytest.raises(
        ValueError, match=rf"was trained to step 8 with {field}={before} \(now {value!r}\); give the old"
    ):
        resume.check_changes(done, config, allowed=False)
    assert resume.check_changes(done, config, allowed=True) == [f"resuming with {field}={value!r}, before {before}"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("loop.checkpoint_every", 3), ("data.eval_split", "train"), ("init_from", "/nowhere"), ("save.keep", 5)],
)
def test_a_field_that_leaves_the_run_as_it_is_is_logged(
    field: str, value: Any, digits_dir: pathlib.Path, done: pathlib.Path
) -> None:
    (line,) = resume.check_changes(done, config_of(digits_dir, **{field: value}), allowed=False)
    assert line.startswith(f"resuming with {field}={value!r}, before ")


def test_a_damaged_config_is_named(digits_dir: pathlib.Path, workdir: pathlib.Path) -> None:
    (workdir / "config.json").write_text(json.dumps({"format": 1})[:5])
    with pytest.raises(ValueError, match=rf"{workdir}/config.json cannot be read: "):
        resume.check_changes(workdir, config_of(digits_dir), allowed=False)
