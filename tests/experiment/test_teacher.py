"""Distillation: runs that learn from a teacher, resumed and used without it."""

import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import Finished, tiny
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import halvit_jax
from halvit_jax import plan
from halvit_jax.analysis import aot_plan
from halvit_jax.analysis.tpu_topology import Topology
from halvit_jax.cli import app
from halvit_jax.cli.preflight import preflight
from halvit_jax.convert import hub, readers, shapes_of, to_torch, weights_file
from halvit_jax.experiment import build, tasks, teacher
from halvit_jax.experiment.trained import abstract_checkpoint_state, load_trained
from halvit_jax.experiment.workdir import TEACHER_FILE
from halvit_jax.main import run_experiment
from halvit_jax.recipes import digits
from halvit_jax.training.checkpoint.checkpointer import FOLDER, Checkpointer
from halvit_jax.training.sharding import make_mesh, to_devices, to_host
from halvit_jax.training.step import make_train_step
from halvit_jax.trees import flatten, sha256, unflatten

SHAPE = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 2}  # of the finished run's model
REGNET = {"depths": (1,), "widths": (8,), "group_width": 4, "num_classes": 10, "image_size": 8}
HALF, QUARTER = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def distill_config(digits_dir: pathlib.Path, source: Any, **changes: Any) -> ConfigDict:
    """The small run on digits with a teacher."""
    fields = {"task.name": "distillation", "teacher.init_from": str(source), "model.distilled": True}
    return tiny(digits_dir, **fields | changes)


def random_file(path: pathlib.Path, name: str, about: dict[str, str], **fields: Any) -> pathlib.Path:
    """A file of ours with arbitrary weights."""
    rng = np.random.default_rng(0)
    shapes = shapes_of(halvit_jax.create_model(name, **fields))
    arrays = {key: rng.uniform(0.1, 1.0, shape).astype(np.float32) for key, shape in shapes.items()}
    weights_file.save(path, name, unflatten(arrays), metadata=about, **fields)
    return path


class DistilledRun(NamedTuple):
    """A teacher's workdir, the config and workdir of a run that learned from it, and that run's result."""

    teacher: pathlib.Path
    config: ConfigDict
    workdir: pathlib.Path
    result: dict[str, Any]


@pytest.fixture(scope="module")
def distilled(finished: Finished, digits_dir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> DistilledRun:
    folder = tmp_path_factory.mktemp("distilled")
    shutil.copytree(finished[0], folder / "teacher")
    config = distill_config(digits_dir, folder / "teacher", **{"loop.accumulate": 2})
    return DistilledRun(folder / "teacher", config, folder / "run", run_experiment(config, folder / "run"))


@pytest.fixture
def without_teacher(distilled: DistilledRun) -> Iterator[DistilledRun]:
    """The run after its teacher was moved away."""
    distilled.teacher.rename(distilled.teacher.with_name("away"))
    yield distilled
    distilled.teacher.with_name("away").rename(distilled.teacher)


@pytest.mark.slow  # the run of `distilled` takes half a minute
def test_a_distilled_run_records_its_teacher(distilled: DistilledRun, finished: Finished) -> None:
    assert distilled.result["step"] == 8
    assert distilled.result["eval"].keys() == {"loss", "top1", "top5"}
    record = json.loads((distilled.workdir / TEACHER_FILE).read_text())
    assert (record["source"], record["model"]) == (str(distilled.teacher), "halvit_tiny")
    _, variables = halvit_jax.load(finished[0])
    assert record["sha256"] == sha256(flatten(variables))
    assert record["parameters"] == finished[1]["params"]
    assert distilled.result["params"] > record["parameters"]  # it has a token and a head more


@pytest.mark.slow
def test_the_teacher_is_in_no_checkpoint(distilled: DistilledRun) -> None:
    checkpointer = Checkpointer(distilled.workdir, read_only=True)
    saved = checkpointer.metadata(8)["arrays"]
    checkpointer.close()
    state = abstract_checkpoint_state(tasks.build_task(distilled.config), distilled.config)
    assert saved.keys() == flatten(state).keys()


@pytest.mark.slow
def test_a_distilled_run_resumes_and_ends_with_the_same_parameters(
    distilled: DistilledRun, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(distilled.workdir / FOLDER / "4", tmp_path / FOLDER / "4")
    shutil.copy(distilled.workdir / TEACHER_FILE, tmp_path)
    resumed = run_experiment(distilled.config, tmp_path)
    assert {**resumed, "images_per_s": 0} == {**distilled.result, "images_per_s": 0}


@pytest.mark.slow
def test_a_distilled_model_is_loaded_evaluated_and_served_without_its_teacher(without_teacher: DistilledRun) -> None:
    _, config, workdir, result = without_teacher
    model, variables = halvit_jax.load(workdir)
    assert model.distilled
    assert model.apply(variables, np.zeros((1, 8, 8, 3), np.float32), train=False).shape == (1, 10)
    trained = load_trained(workdir)
    assert trained.task.predict(*trained.variables, {"image": np.zeros((1, 8, 8, 3), np.uint8)}).shape == (1, 10)
    assert run_experiment(config, workdir, mode="eval")["eval"] == result["eval"]


@pytest.mark.slow
def test_a_distilled_run_does_not_resume_without_its_teacher(
    without_teacher: DistilledRun, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_experiment(without_teacher.config, without_teacher.workdir)
    assert ended.value.code == app.ExitCode.BAD_INPUT
    assert "train the teacher first, or set teacher.name to plan a run without it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_distilled_run_does_not_resume_with_another_teacher(
    distilled: DistilledRun, digits_dir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = random_file(tmp_path / "other.safetensors", "halvit_tiny", {}, **SHAPE, num_classes=10, image_size=8)
    before = (distilled.workdir / TEACHER_FILE).read_text()
    with pytest.raises(SystemExit) as ended:
        run_experiment(distill_config(digits_dir, other, **{"loop.accumulate": 2}), distilled.workdir)
    assert ended.value.code == app.ExitCode.BAD_INPUT
    assert (
        f"holds other weights than the teacher that the run in --workdir={distilled.workdir}" in capsys.readouterr().err
    )
    assert (distilled.workdir / TEACHER_FILE).read_text() == before


@pytest.mark.slow  # half a minute to compile
def test_the_teacher_is_sharded_and_steps_do_not_change_it(digits_dir: pathlib.Path, finished: Finished) -> None:
    run = build.build(distill_config(digits_dir, finished[0], **{"mesh.fsdp": 2}))
    frozen = run.task.constants
    kernel = frozen["params"]["block0"]["ffn"]["tied"]["kernel"]
    state = run.fresh_state(run.abstract_state())
    assert kernel.sharding == state.params["block0"]["ffn"]["tied"]["kernel"].sharding
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
    before = sha256(to_host(frozen))
    step = make_train_step(run.task, run.optimizer, seed=0, ema_decay=0.0)
    batches = run.loaders.train.batches(0)
    for _ in range(2):
        state, outcome = step(state, frozen, to_devices(next(batches), run.mesh))
        assert outcome.healthy
    assert sha256(to_host(frozen)) == before
    assert sha256(flatten(to_host(frozen))) == run.distillation.record["sha256"]


@pytest.mark.parametrize("kind", ["workdir", "native"])
def test_a_teacher_is_loaded_from_a_workdir_or_a_weights_file(
    kind: str, finished: Finished, digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    _, variables = halvit_jax.load(finished[0])
    source = finished[0]
    if kind == "native":
        source = tmp_path / "teacher.safetensors"
        weights_file.save(source, "halvit_tiny", variables, **SHAPE, num_classes=10, image_size=8)
    config = distill_config(digits_dir, source, compute_dtype="bfloat16")
    setup = teacher.build_distillation(config, make_mesh())
    assert setup.record["sha256"] == sha256(flatten(variables))
    assert (setup.task.teacher.dtype, setup.task.teacher.num_heads) == ("bfloat16", 2)
    jax.tree.map(np.testing.assert_array_equal, setup.task.constants, variables)
    assert setup.lines()[0].startswith(f"teacher.init_from={source}: halvit_tiny, 14,250 parameters")


def test_a_pytorch_teacher_needs_only_its_model_name(digits_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    fields = {"num_classes": 10, "image_size": 8}
    variables = weights_file.load(random_file(tmp_path / "x.safetensors", "regnety_002", {}, **fields)).variables
    np.savez(tmp_path / "teacher.npz", **to_torch("regnety_002", variables, **fields))
    config = distill_config(digits_dir, tmp_path / "teacher.npz", **{"teacher.name": "regnety_002"})
    assert teacher.build_distillation(config, make_mesh()).record["sha256"] == sha256(flatten(variables))


def test_a_teacher_of_another_resolution_has_its_positions_resampled(
    finished: Finished, digits_dir: pathlib.Path
) -> None:
    setup = teacher.build_distillation(distill_config(digits_dir, finished[0], **{"model.image_size": 12}), make_mesh())
    assert setup.task.teacher.image_size == 12
    assert "adapted: params/position/embedding (17, 32) -> (37, 32)" in setup.lines()[-1]


@pytest.mark.parametrize(
    ("about", "given", "expected"),
    [
        ({}, {}, HALF),  # the student's
        ({"info": json.dumps({"mean": QUARTER, "std": QUARTER})}, {}, QUARTER),  # of a file of halvit_jax.export
        ({}, {"teacher.mean": QUARTER, "teacher.std": QUARTER}, QUARTER),
    ],
)
def test_the_normalisation_of_the_teacher_comes_from_its_file_or_the_config(
    about: dict[str, str],
    given: dict[str, Any],
    expected: tuple[float, ...],
    digits_dir: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    source = random_file(tmp_path / "regnet.safetensors", "regnety_002", about, **REGNET)
    unmixed = dict.fromkeys(("classification.mixup", "classification.cutmix", "classification.erase"), 0.0)
    task = teacher.build_distillation(distill_config(digits_dir, source, **unmixed | given), make_mesh()).task
    assert task.constants.keys() == {"params", "batch_stats"}
    seen = {}

    def network(name: str) -> SimpleNamespace:
        def apply(variables: Any, images: jax.Array, **_: Any) -> tuple[jax.Array, dict]:
            seen[name] = np.asarray(images)
            return jnp.zeros((len(images), 10)), {}

        return SimpleNamespace(num_classes=10, apply=apply)

    task.model, task.teacher = network("student"), network("teacher")
    colours = jnp.asarray([[[0, 0, 0], [255, 255, 255]]], jnp.uint8)
    batch = {"image": colours[None], "label": jnp.zeros(1, jnp.int32), "mask": jnp.ones(1, bool)}
    task.loss({}, {}, task.constants, batch, jax.random.key(0))
    for name, mean in (("student", HALF), ("teacher", expected)):
        black, white = seen[name][0, 0]
        np.testing.assert_allclose(black, (0 - np.asarray(mean)) / mean, atol=1e-6)
        np.testing.assert_allclose(white, (1 - np.asarray(mean)) / mean, atol=1e-6)


WRONG = {
    "task.name='distillation' needs a teacher; set teacher.init_from": {"teacher.init_from": ""},
    "needs task.name='distillation', not 'classification'": {"task.name": "classification"},
    "task.name='teach' is not one of classification, distillation": {"task.name": "teach"},
    "distillation.kind='firm' is not one of hard, soft": {"distillation.kind": "firm"},
    "set model.distilled=True, distillation.alpha=1.0, or distillation.kind='soft'": {"model.distilled": False},
    "distillation.student_layers=(0, 1) and distillation.teacher_layers=(0,) must have the same number": {
        "distillation.qkv_weight": 1.0,
        "distillation.student_layers": (0, 1),
        "distillation.teacher_layers": (0,),
    },
    "distillation.teacher_layers has [2], but the teacher's are 0 to 1": {
        "distillation.kind": "soft",
        "model.distilled": False,
        "distillation.hidden_weight": 0.1,
        "distillation.student_layers": (0, 1),
        "distillation.teacher_layers": (1, 2),
    },
    "teacher.init_from=/nowhere does not exist (/nowhere); train the": {"teacher.init_from": "/nowhere"},
    "teacher.init_from=/nowhere: /nowhere does not exist": {
        "teacher.init_from": "/nowhere",
        "teacher.name": "resnet18",
    },
    "teacher.name='deit_tiny', but the model in": {"teacher.name": "deit_tiny"},
    "teacher.mean=(0.25, 0.25, 0.25), but the model in": {"teacher.mean": QUARTER},
    "teacher.name='halvit_tny' is unknown; did you mean 'halvit_tiny'": {
        "teacher.init_from": "/nowhere",
        "teacher.name": "halvit_tny",
    },
    "the teacher, for images of the student's size: model.patch_size=16 does not divide model.image_size=8": {
        "teacher.init_from": "/nowhere",
        "teacher.name": "halvit_tiny",
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_teacher_is_refused_by_field(
    message: str,
    finished: Finished,
    digits_dir: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_experiment(distill_config(digits_dir, finished[0], **WRONG[message]), tmp_path / "run")
    assert ended.value.code == app.ExitCode.BAD_INPUT
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_channels_is_refused(digits_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    known = random_file(tmp_path / "known.safetensors", "regnety_002", {}, **REGNET)
    grey = {"model.in_channels": 1, "task.mean": (0.5,), "task.std": (0.5,)}
    with pytest.raises(ValueError, match=r"the teacher sees 3 channels, the student model.in_channels=1; give a"):
        teacher.build_distillation(distill_config(digits_dir, known, **grey), make_mesh())


def test_a_teacher_of_other_classes_is_refused(digits_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    seven = {"num_classes": 7, "image_size": 8}
    known = random_file(tmp_path / "known.safetensors", "regnety_002", {}, **seven)
    with pytest.raises(ValueError, match=r"the teacher has 7 classes, the student model.num_classes=10"):
        teacher.build_distillation(distill_config(digits_dir, known), make_mesh())
    state = to_torch("regnety_002", weights_file.load(known).variables, **seven)
    readers.write(tmp_path / "torch.safetensors", state, {})
    message = (
        r"must have the student's model.num_classes=10; missing: params/head/\w+ .*; not used: params/head/\w+ .*7"
    )
    with pytest.raises(ValueError, match=message):
        teacher.build_distillation(
            distill_config(digits_dir, tmp_path / "torch.safetensors", **{"teacher.name": "regnety_002"}), make_mesh()
        )


def test_a_state_without_a_name_is_refused(digits_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    readers.write(tmp_path / "torch.safetensors", {"a": np.zeros(1, np.float32)}, {})
    np.savez(tmp_path / "torch.npz", a=np.zeros(1, np.float32))
    for source in (tmp_path / "torch.safetensors", tmp_path / "torch.npz", "hf://me/unknown"):
        with pytest.raises(ValueError, match="does not name its model"):
            teacher.build_distillation(distill_config(digits_dir, source), make_mesh())


def test_a_repository_of_published_weights_names_the_teachers_model(
    digits_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(source: str) -> pathlib.Path:
        raise ValueError(f"{source} is asked for")

    monkeypatch.setattr(hub, "download", download)
    with pytest.raises(ValueError, match=r"hf://timm/resnet18\.tv_in1k is asked for"):
        teacher.build_distillation(distill_config(digits_dir, "hf://timm/resnet18.tv_in1k"), make_mesh())


@pytest.mark.slow  # it compiles for half a minute
def test_preflight_looks_at_the_teacher_and_compiles_with_it(
    finished: Finished, digits_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preflight(distill_config(digits_dir, finished[0]), None) == 0
    lines = capsys.readouterr().out
    line = r"^ok    teacher     halvit_tiny, 14,250 parameters, sha256 \w{16}; \d+ arrays copied"
    assert re.search(line, lines, re.M)
    assert re.search(r"^ok    step        compiled in", lines, re.M)
    assert preflight(distill_config(digits_dir, "/nowhere"), None) == app.ExitCode.BAD_INPUT
    lines = capsys.readouterr().out
    assert re.search(r"^FAIL  teacher     teacher.init_from=/nowhere does not name", lines, re.M)
    assert re.search(r"^skip  step        needs teacher", lines, re.M)


@pytest.mark.slow  # it compiles
def test_plan_needs_no_teacher_weights(digits_dir: pathlib.Path) -> None:
    fields = {"teacher.name": "resnet18", "mesh.fsdp": 2, "loop.ema_decay": 0.0}
    config = distill_config(digits_dir, "/nowhere", **fields)
    subject = aot_plan.prepare(config, Topology("v5e", (2, 4)), jax.devices())
    kernel = flatten(subject.constants)["params/stage1/block0/conv1/kernel"]
    assert kernel.sharding.spec == P(None, None, None, "fsdp")
    report = aot_plan.plan(subject)
    plain = aot_plan.prepare(tiny(digits_dir, **{"mesh.fsdp": 2}), Topology("v5e", (2, 4)), jax.devices())
    assert plain.constants == {}
    assert report["bytes"]["constants"] > 11_000_000 * 2 // 2  # half of its kernels
    assert "constants" in plan.table(report)


@pytest.mark.slow  # half a minute to compile
def test_the_soft_distillation_recipe_trains_on_digits(
    finished: Finished, digits_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = digits.distilled("halvit_tiny", "soft")
    shape = {f"model.{field}": value for field, value in SHAPE.items()}
    steps = {
        "total_steps": 2,
        "batch_size": 16,
        "loop.eval_every": 2,
        "loop.checkpoint_every": 2,
        "optim.warmup_epochs": 0.0,
    }
    layers = {"distillation.student_layers": (0, 1), "distillation.teacher_layers": (0, 1)}
    source = {"teacher.init_from": str(finished[0]), "data.data_dir": str(digits_dir), "loop.ema_decay": 0.0}
    config.update_from_flattened_dict(shape | steps | layers | source)
    result = run_experiment(config, tmp_path)
    assert result["step"] == 2
    assert np.isfinite(result["eval"]["loss"])
