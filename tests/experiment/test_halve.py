"""Halving by a config: a small teacher of the digits, its half, and what is refused."""

import json
import os
import pathlib
import signal
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.halving import Teacher, random_deit
from ml_collections import ConfigDict

from halvit_jax import load, predict
from halvit_jax.convert import weights_file
from halvit_jax.experiment import halve, init_from
from halvit_jax.experiment.predictor import predictor_of
from halvit_jax.experiment.tasks import build_task
from halvit_jax.experiment.trained import load_trained
from halvit_jax.recipes import digits

FIELDS = {"width": 16, "depth": 2, "num_heads": 2, "patch_size": 2, "image_size": 8, "num_classes": 10}
SMALL = {"images": 40, "fit_steps": 110, "fit_batch": 64}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return random_deit(**FIELDS)


@pytest.fixture(scope="module")
def source(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weight file of a teacher."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    images = {"info": json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3})}
    weights_file.save(path, "deit_small", teacher.variables, metadata=images, **FIELDS)
    return str(path)


def config_of(digits_dir: pathlib.Path, **changes: Any) -> ConfigDict:
    config = digits.halved("halvit_tiny")
    config.data.data_dir = str(digits_dir)
    config.batch_size = 32
    config.model.update(FIELDS)
    config.update_from_flattened_dict(changes)
    return config


def make(config: ConfigDict, source: str, out: pathlib.Path, log: Any = lambda line: None) -> dict[str, Any]:
    return halve.run(halve.prepare(config, source=source, **SMALL), out, log=log)


@pytest.fixture(scope="module")
def whole(
    digits_dir: pathlib.Path, source: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, dict[str, Any], list[str]]:
    """A halved model's file, the result, and the lines."""
    out, lines = tmp_path_factory.mktemp("halved") / "half.safetensors", []
    return out, make(config_of(digits_dir), source, out, lines.append), lines


@pytest.mark.slow
def test_the_file_serves_as_a_run_does(
    whole: tuple[pathlib.Path, dict[str, Any], list[str]], teacher: Teacher, digits_dir: pathlib.Path
) -> None:
    out, result, lines = whole
    assert [line.split(":")[0] for line in lines] == ["teacher", "block 0", "block 1", "student"]
    assert not list(out.parent.glob("*.progress*"))
    model, variables = load(out)
    assert (model.attention, model.ffn) == ("tied", "tied")
    np.testing.assert_array_equal(variables["params"]["class_token"], teacher.variables["params"]["class_token"])
    config = config_of(digits_dir, init_from=str(out))
    assert not init_from.read_for_task(config, build_task(config)).lines()[1:]  # all is copied
    trained = load_trained(out)
    assert trained.info.class_names == [str(i) for i in range(10)]
    image = out.with_suffix(".png")
    from halvit_jax import data

    data.write_png(str(image), np.zeros((8, 8, 3), np.uint8))
    ((row, _),) = predict.predict(predictor_of(trained), [str(image)])
    logits = model.apply(variables, jnp.full((1, 8, 8, 3), -1.0), train=False)
    assert row["top5"][0]["class"] == str(int(logits.argmax()))
    errors = result["blocks"][1]
    assert errors["attention"]["after"] < errors["attention"]["before"]
    assert errors["ffn"]["after"] < errors["ffn"]["before"]


@pytest.mark.slow
def test_a_halving_stopped_by_sigterm_goes_on_to_the_same_file(
    whole: tuple[pathlib.Path, dict[str, Any], list[str]], digits_dir: pathlib.Path, source: str, tmp_path: pathlib.Path
) -> None:
    """Stopped behind the first block, then in the fit of the second."""
    out, config = tmp_path / "half.safetensors", config_of(digits_dir)

    def stop(line: str) -> None:
        if line.startswith("block 0"):
            os.kill(os.getpid(), signal.SIGTERM)

    assert make(config, source, out, stop) == {"stopped": "SIGTERM"}
    assert not out.exists()
    with pytest.raises(ValueError, match=r"half.safetensors.progress.safetensors is the progress of another teacher"):
        make(config_of(digits_dir, seed=1), source, out)
    with pytest.MonkeyPatch.context() as patch:
        tie = halve.vit._tie_attention

        def stop_in_fit(*arguments: Any) -> Any:
            found = tie(*arguments)
            patch.setattr(halve.vit, "_start_ffn", stop_before(halve.vit._start_ffn))
            return found

        def stop_before(start: Any) -> Any:
            def stopped(*arguments: Any) -> Any:
                os.kill(os.getpid(), signal.SIGTERM)
                return start(*arguments)

            return stopped

        patch.setattr(halve.vit, "_tie_attention", stop_in_fit)
        assert make(config, source, out) == {"stopped": "SIGTERM"}
    lines: list[str] = []
    result = make(config, source, out, lines.append)
    assert [line.split(":")[0] for line in lines] == ["teacher", "block 0", "block 1", "student"]
    assert result["sha256"] == whole[1]["sha256"]
    assert lines == whole[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 32}, "model.width=32, but the teacher has 16; halving keeps the shape"),
        ({"model.image_size": 12}, r"teacher.init_from=.* is of another model.image_size than 12"),
        ({"model.num_classes": 7}, "model.num_classes=7"),
        ({"task.mean": (0.4, 0.5, 0.5)}, r"task.mean=\(0.4, 0.5, 0.5\), but the teacher has \(0.5, 0.5, 0.5\)"),
        ({"mesh.data": 3}, "mesh.data=3"),
        ({"batch_size": 4}, "batch_size=4 does not divide"),
    ],
)
def test_configs_that_do_not_fit_the_teacher_are_refused(
    changes: dict[str, Any], message: str, digits_dir: pathlib.Path, source: str
) -> None:
    with pytest.raises(ValueError, match=message):
        halve.prepare(config_of(digits_dir, **changes), source=source, **SMALL)


def test_a_teacher_and_enough_images_are_needed(digits_dir: pathlib.Path, source: str) -> None:
    config = config_of(digits_dir)
    with pytest.raises(ValueError, match="images=0 with 17 tokens each"):
        halve.prepare(config, source=source, images=0)
    with pytest.raises(ValueError, match="fit_batch=9 does not divide over 8 devices"):
        halve.prepare(config, source=source, images=40, fit_batch=9)
    config.teacher.init_from = ""
    with pytest.raises(ValueError, match=r"--teacher is not given, and teacher.init_from is empty"):
        halve.prepare(config, source="", images=40)
