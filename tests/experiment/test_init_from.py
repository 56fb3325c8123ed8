"""Runs that begin with weights of others."""

import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from helpers.runs import Finished, tiny
from helpers.tiers import tiered
from PIL import Image
from sklearn.datasets import load_digits

import halvit_jax
from halvit_jax import export
from halvit_jax.cli.preflight import preflight
from halvit_jax.convert import readers, to_torch, weights_file
from halvit_jax.experiment import build, init_from, tasks
from halvit_jax.experiment import workdir as files
from halvit_jax.experiment.trained import load_trained, restore
from halvit_jax.main import run_experiment
from halvit_jax.protocols import DatasetInfo
from halvit_jax.recipes import digits
from halvit_jax.trees import flatten


@pytest.fixture
def source(finished: Finished, tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> pathlib.Path:
    """The finished run itself, as our file, or as a PyTorch state."""
    if request.param == "workdir":
        return finished[0]
    model, variables = halvit_jax.load(finished[0])
    fields = {name: getattr(model, name) for name in ("width", "depth", "num_heads", "patch_size")}
    fields |= {"num_classes": 10, "image_size": 8}
    path = tmp_path / f"{request.param}.safetensors"
    if request.param == "native":
        weights_file.save(path, "halvit_tiny", variables, **fields)
    else:
        readers.write(path, to_torch("halvit_tiny", variables, **fields), {})
    return path


@pytest.mark.parametrize("source", tiered(["workdir", "native", "torch"], {"workdir"}), indirect=True)
def test_init_from_loads_what_fits_and_lists_the_rest(
    source: pathlib.Path, finished: Finished, digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    fresh = ("^head/bias", "norm/scale$")
    config = tiny(digits_dir, **{"init_from": str(source), "init_exclude": fresh, "model.image_size": 12})
    run = build.build(config)
    logged: list[str] = []
    state = init_from.fresh_state(
        run.abstract_state(),
        task=run.task,
        init=run.fresh_state,
        config=config,
        info=run.loaders.info,
        workdir=tmp_path,
        log=logged.append,
    )
    _, variables = halvit_jax.load(finished[0])
    old, new, averages = (flatten(tree) for tree in (variables["params"], state.params, state.ema["params"]))
    begun = flatten(run.fresh_state(run.abstract_state()).params)
    for path, value in new.items():
        if path == "head/bias" or path.endswith("norm/scale"):
            np.testing.assert_array_equal(value, begun[path])
        elif path == "position/embedding":
            assert value.shape == (37, 32)
            np.testing.assert_array_equal(value[0], old[path][0])
        else:
            np.testing.assert_array_equal(value, old[path])
        np.testing.assert_array_equal(value, averages[path])
        assert value.sharding == flatten(run.abstract_state().params)[path].sharding
    assert int(state.step) == 0
    listed = json.loads((tmp_path / files.INIT_FROM_FILE).read_text())
    assert listed["source"] == str(source)
    assert listed["adapted"] == ["params/position/embedding (17, 32) -> (37, 32)"]
    assert len(listed["loaded"]) + len(listed["initialized"]) == len(new)
    assert "params/head/bias (10,)" in listed["initialized"]
    assert logged[0] == f"init_from={source}: {len(listed['loaded']) - 1} arrays copied"
    assert logged[1] == f"init_from={source}: adapted: {listed['adapted'][0]}"


@pytest.mark.parametrize("ema", [True, False])
def test_init_from_takes_the_averages_of_a_run_or_its_raw_weights(
    ema: bool, finished: Finished, digits_dir: pathlib.Path
) -> None:
    config = tiny(digits_dir, **{"init_from": str(finished[0]), "init_ema": ema})
    task = tasks.build_task(config)
    state = restore(task, config, finished[0])
    wanted, other = (state.ema, state.trained) if ema else (state.trained, state.ema)
    kernel = init_from.read_for_task(config, task).arrays["params/head/kernel"]
    np.testing.assert_array_equal(kernel, wanted["params"]["head"]["kernel"])
    assert (kernel != other["params"]["head"]["kernel"]).any()


@pytest.mark.slow
def test_init_from_trains_and_a_checkpoint_takes_precedence(
    finished: Finished, digits_dir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    short = {"total_steps": 2, "loop.eval_every": 2, "loop.checkpoint_every": 2, "init_from": str(finished[0])}
    frozen = {"optim.frozen": ("^block", "^embed", "^position"), "optim.learning_rate": 0.1}
    run_experiment(tiny(digits_dir, **short | frozen), tmp_path)
    assert "arrays copied" in capsys.readouterr().out
    assert preflight(tiny(digits_dir, **short), None, compile_step=False) == 0
    assert re.search(r"^ok    init_from   \d+ arrays copied$", capsys.readouterr().out, re.MULTILINE)
    config = files.read_config(tmp_path)
    state = restore(tasks.build_task(config), config, tmp_path)
    old = flatten(halvit_jax.load(finished[0])[1]["params"])
    for path, value in flatten(state.params).items():
        same = np.array_equal(value, old[path])
        assert same == path.startswith(("block", "embed", "position")), path
    moments = [path for path in flatten(state.opt_state) if "block0" in path]
    assert not moments  # nothing is kept for what is not trained
    run_experiment(
        tiny(digits_dir, **short | frozen | {"init_from": "/nowhere"}), tmp_path
    )  # finished: it needs it no more
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "/nowhere"}, "init_from=/nowhere: /nowhere does not exist"),
        (
            {"init_from": "WORKDIR", "model.depth": 3},
            "these weights cannot initialise halvit_tiny; .* missing",
        ),
        ({"optim.frozen": ("haed",)}, "optim.frozen holds 'haed', which matches no parameter"),
        ({"optim.frozen": ("",)}, "leaves nothing to train"),
        ({"init_from": "WORKDIR", "init_exclude": ("haed",)}, "init_exclude: 'haed' matches no path"),
    ],
)
def test_a_wrong_init_from_is_refused_by_field(
    changes: dict[str, Any],
    message: str,
    finished: Finished,
    digits_dir: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
) -> None:
    changes = {name: str(finished[0]) if value == "WORKDIR" else value for name, value in changes.items()}
    with pytest.raises(SystemExit) as end:
        run_experiment(tiny(digits_dir, **changes), tmp_path)
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


def test_a_task_without_a_model_loads_from_a_workdir_only(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "weights.npz"
    file.touch()
    with pytest.raises(ValueError, match=re.escape(f"init_from={file}: this task loads weights from a workdir only")):
        init_from.read(str(file), "halvit_tiny", None, shapes={}, rules=())


@pytest.mark.slow
def test_fine_tuning_beats_training_from_scratch(tmp_path: pathlib.Path) -> None:
    """Five digits are learned from what was learned of the five others, with other resolution and classifier."""
    images_and_labels = load_digits()
    for name, classes, most in (("low", range(5), 1000), ("high", range(5, 10), 20)):
        for label in classes:
            images = images_and_labels.images[images_and_labels.target == label]
            for i, image in enumerate(images):
                split = "val" if i >= len(images) - 60 else "train"
                if split == "train" and i >= most:
                    continue
                path = tmp_path / name / split / str(label) / f"{i:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(path)

    def run(name: str, folder: str, **changes: Any) -> float:
        fields = {"data.name": "folder", "data.root": str(tmp_path / folder), "data.eval_split": "val"}
        fields |= {"model.num_classes": 5, "optim.warmup_epochs": 2.0, "batch_size": 64, "data.virtual_shards": 4}
        fields |= {"loop.eval_every": 1000, "loop.checkpoint_every": 1000, "total_steps": 60}
        config = digits.vit("halvit_tiny")
        config.update_from_flattened_dict(fields | changes)
        return run_experiment(config, tmp_path / f"run_{name}")["eval"]["top1"]

    before = run("low", "low", total_steps=500, **{"optim.warmup_epochs": 5.0})
    assert before > 0.9
    larger = {"model.image_size": 12}
    scratch = run("scratch", "high", **larger)
    tuned = run("tuned", "high", **larger, init_from=str(tmp_path / "run_low"), init_exclude=("^head/",))
    print(f"scratch {scratch:.2%}, fine-tuned {tuned:.2%}")
    assert tuned > scratch + 0.05


@pytest.mark.parametrize("exported", [False, True])
def test_a_classifier_of_other_classes_is_warned_of(
    exported: bool, finished: Finished, digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = finished[0]
    if exported:
        trained = load_trained(source)
        export.export(trained, "safetensors", source := tmp_path / "model.safetensors")
    names = [f"animal {i}" for i in range(10)]
    for exclude, info, count in (((), names, 1), (("^head/",), names, 0), ((), [str(i) for i in range(10)], 0)):
        config = tiny(digits_dir, init_from=str(source), init_exclude=exclude)
        task = tasks.build_task(config)
        found = init_from.read_for_task(config, task)
        lines = init_from.other_classes(config, task, found, DatasetInfo(info, 1))
        assert len(lines) == count
    config.init_exclude = ()
    (line,) = init_from.other_classes(config, task, init_from.read_for_task(config, task), DatasetInfo(names, 1))
    assert line.startswith("WARNING: its classes are 0, 1, 2, 3, 4 and 5 more, those of the data animal 0, animal 1")
    assert "--config.init_exclude" in line


def test_a_source_that_is_not_there_is_named_with_its_whole_path(
    digits_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source, message in {
        "runs/nothere": rf"init_from=runs/nothere: {pathlib.Path.cwd()}/runs/nothere does not exist; train it first",
        "s3://bucket/run": "init_from=s3://bucket/run: s3://bucket/run must be a local path or the address of a bucket, gs://BUCKET/FOLDER",
    }.items():
        config = tiny(digits_dir, init_from=source)
        with pytest.raises(ValueError, match=message):
            init_from.read_for_task(config, tasks.build_task(config))


def test_init_from_takes_the_best_checkpoint_or_that_of_a_step(finished: Finished, digits_dir: pathlib.Path) -> None:
    found = {}
    for step in ("", "@best", "@4"):
        config = tiny(digits_dir, init_from=f"{finished[0]}{step}")
        found[step] = init_from.read_for_task(config, tasks.build_task(config)).arrays["params/head/bias"]
    np.testing.assert_array_equal(found[""], found["@best"])
    assert (found[""] != found["@4"]).any()
