"""The command that verifies a workdir and dry-runs a config: every line of it."""

import json
import os
import pathlib
import re
import shutil
from typing import Any

import pytest
from helpers.processes import run_command
from helpers.runs import tiny
from ml_collections import ConfigDict

from halvit_jax import check
from halvit_jax.cli import app, preflight
from halvit_jax.experiment import lock
from halvit_jax.training.checkpoint import manifest

CHECK = "halvit_jax.check"
Capsys = pytest.CaptureFixture[str]


def small(digits_dir: pathlib.Path, **changes: Any) -> ConfigDict:
    """The finished run's, of any batch size."""
    return tiny(digits_dir, **{"loop.eval_every": 8, "recipe_batch_size": 0} | changes)


@pytest.fixture(scope="module")
def done(finished: tuple[pathlib.Path, dict[str, Any]]) -> pathlib.Path:
    """A workdir with checkpoints of the steps 4 and 8; only the second has a score."""
    return finished[0]


@pytest.fixture
def workdir(done: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of it to be damaged."""
    return shutil.copytree(done, tmp_path / "run")


def verified(workdir: pathlib.Path, capsys: Capsys, *, code: int, files_only: bool = False) -> list[str]:
    """The lines of a verification that ends with this code."""
    capsys.readouterr()
    before = listing(workdir)
    assert check.verify(workdir, files_only=files_only) == code
    assert listing(workdir) == before
    return capsys.readouterr().out.splitlines()


def tried(
    config: ConfigDict, workdir: pathlib.Path | None, capsys: Capsys, *, code: int = 2, whole: bool = False
) -> list[str]:
    """The lines of a preflight that ends with this code; unless whole, without what takes long: compiling, batches."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        if not whole:
            patch.setattr(preflight, "_batches", lambda data: preflight.CheckResult("none was read"))
        assert preflight.preflight(config, workdir, compile_step=whole) == code
    return capsys.readouterr().out.splitlines()


def line_of(lines: list[str], verdict: str, name: str) -> str:
    """What was logged of one item."""
    (found,) = [line for line in lines if line.split()[:2] == [verdict, name]]
    return found


def listing(folder: pathlib.Path) -> dict[str, int]:
    """Every file and when it was changed."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def largest_file(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """A file of a checkpoint, of which arrays are kept in."""
    paths = [path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    return max((path for path in paths if path.name != manifest.NAME), key=lambda path: path.stat().st_size)


def flip(path: pathlib.Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("files_only", [False, True])
def test_a_good_workdir(files_only: bool, workdir: pathlib.Path, capsys: Capsys) -> None:
    lines = verified(workdir, capsys, code=0, files_only=files_only)
    score = json.loads((workdir / "result.json").read_text())["ema_eval"]["top1"]
    assert lines == [
        "lock  free",
        "step 4  good",
        f"step 8  good, score {score:.6g}",
        "2 checkpoints, 2 good",
        "a run would resume from step 8",
    ]


@pytest.mark.parametrize("files_only", [False, True])
def test_a_flipped_bit_and_a_deleted_file_are_named(files_only: bool, workdir: pathlib.Path, capsys: Capsys) -> None:
    flip(largest_file(workdir, 8))
    lines = verified(workdir, capsys, code=1, files_only=files_only)
    pattern = rf"step 8  corrupt: {re.escape(str(largest_file(workdir, 8)))} has the digest \w{{16}}, expected \w{{16}}"
    assert re.fullmatch(pattern, lines[2])
    assert lines[3:] == ["2 checkpoints, 1 good; corrupt: step 8", "a run would resume from step 4"]
    lost = largest_file(workdir, 4)
    lost.unlink()
    lines = verified(workdir, capsys, code=1, files_only=files_only)
    assert lines[1] == f"step 4  corrupt: {lost} is missing"
    assert lines[3:] == [
        "2 checkpoints, 0 good; corrupt: step 4, step 8",
        "no checkpoint is good; start over with --restart_if_corrupt, or in another --workdir",
    ]


# Orbax leaves the other reads behind when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_step_that_was_not_sealed_passes_by_its_arrays_alone(workdir: pathlib.Path, capsys: Capsys) -> None:
    manifest.unseal(workdir / "checkpoints" / "8")
    unsealed = "step 8  not sealed (the run ended while it was written); its arrays "
    line = verified(workdir, capsys, code=0)[2]
    assert line.startswith(f"{unsealed}verify, score ")
    line = verified(workdir, capsys, code=0, files_only=True)[2]
    assert line.startswith(f"{unsealed}were not verified, score ")
    for path in (workdir / "checkpoints" / "8" / "default").rglob("*"):
        if path.is_file():  # all, for some are not read
            flip(path)
    lines = verified(workdir, capsys, code=1)
    assert lines[2].startswith(f"{unsealed}do not verify: ")
    assert lines[-1] == "a run would resume from step 4"


def test_a_config_that_cannot_be_read_leaves_the_files_to_be_verified(workdir: pathlib.Path, capsys: Capsys) -> None:
    (workdir / "config.json").write_text("{")
    lines = verified(workdir, capsys, code=1)
    assert lines[1].startswith("config.json  corrupt: ")
    assert lines[1].endswith("; so the arrays were not verified")
    assert lines[2] == "step 4  good"
    assert lines[4] == "2 checkpoints, 2 good; corrupt: config.json"


def test_a_checkpoint_that_does_not_fit_its_config_is_no_good(workdir: pathlib.Path, capsys: Capsys) -> None:
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["width"] = 64
    (workdir / "config.json").write_text(json.dumps(config))
    lines = verified(workdir, capsys, code=1)
    assert lines[1].startswith("step 4  cannot be restored: the checkpoint of step 4")
    assert any(line.endswith("scale: float32 (32,) saved, float32 (64,) in this model") for line in lines)


def test_leftovers_and_the_lock_are_named(workdir: pathlib.Path, capsys: Capsys) -> None:
    unfinished = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    aside = workdir / "corrupt" / "1"
    for folder in (unfinished, aside):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"12345")
    lines = verified(workdir, capsys, code=0)
    assert "leftover  checkpoints/3.orbax-checkpoint-tmp, 5 bytes: an unfinished save; the next run removes it" in lines
    assert "leftover  corrupt/1, 5 bytes: a quarantined corrupt checkpoint; safe to delete" in lines
    with lock.acquire(workdir):
        manifest.unseal(workdir / "checkpoints" / "8")
        shutil.rmtree(workdir / "checkpoints" / "8" / "default")
        lines = verified(workdir, capsys, code=0)
        assert lines[0].startswith(f"lock  held by process {os.getpid()} on ")
        assert "step 8  is being written or deleted by the run" in lines
        assert any(line.endswith("perhaps in progress") for line in lines)
        with pytest.raises(ValueError, match="in use by process"), lock.acquire(workdir):  # it has not been let go
            pass
    with lock.acquire(workdir):  # nor is it kept
        pass


def test_what_is_no_workdir_of_a_run_is_refused(tmp_path: pathlib.Path, capsys: Capsys) -> None:
    with pytest.raises(ValueError, match=r"is no folder; name the workdir of a run"):
        check.verify(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is no workdir of a run: it has neither checkpoints nor config.json"):
        check.verify(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --workdir=DIR to verify its checkpoints, --config=configs/NAME.py to dry-run it"),
        (["--workdir=/nowhere"], "--workdir=/nowhere is no folder"),
        (["--workdir=/nowhere", "--no_compile"], "--no_compile goes with --config"),
        (["--config=configs/halvit_digits.py", "--files_only"], "--files_only goes without --config"),
        (["stray"], "unexpected arguments ['stray']"),
    ],
)
# The loader of config files uses what Python 3.12 deprecates.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_bad_command_line_is_answered_with_a_line(arguments: list[str], message: str, capsys: Capsys) -> None:
    from absl import flags

    values = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "FLAGS", values)
        patch.setattr("jax.config.update", lambda name, value: None)
        for define in ("string", "bool", "integer"):
            of_absl = getattr(flags, f"DEFINE_{define}")
            patch.setattr(flags, f"DEFINE_{define}", lambda *a, f=of_absl, **k: f(*a, flag_values=values, **k))
        from ml_collections import config_flags

        of_collections = config_flags.DEFINE_config_file
        patch.setattr(config_flags, "DEFINE_config_file", lambda *a: of_collections(*a, flag_values=values))
        check.define_flags()
        with pytest.raises(SystemExit) as ended:
            check.main(values(["check", *arguments]))
    assert ended.value.code == app.ExitCode.BAD_INPUT
    assert message in capsys.readouterr().err


def test_the_command_answers_with_its_exit_code(workdir: pathlib.Path) -> None:
    flip(largest_file(workdir, 8))
    done = run_command(CHECK, f"--workdir={workdir}", "--files_only", code=1)
    assert "2 checkpoints, 1 good; corrupt: step 8" in done.stdout
    assert done.stderr == ""


def test_a_run_that_would_go_well(
    digits_dir: pathlib.Path, done: pathlib.Path, tmp_path: pathlib.Path, capsys: Capsys
) -> None:
    lines = tried(small(digits_dir), tmp_path / "new" / "run", capsys, code=0, whole=True)
    logged = [tuple(line.split()[:2]) for line in lines[:-1]]
    names = "config model devices data dataset batches optimizer state workdir space lock checkpoint step"
    assert logged == [("ok", name) for name in names.split()]
    assert lines[-1] == "all is well"
    assert re.search(r"halvit_tiny, [\d,]+ parameters, images of 8x8, float32", line_of(lines, "ok", "model"))
    assert line_of(lines, "ok", "devices").endswith(
        "8 of the 8 devices (cpu), mesh data=8 fsdp=1 tensor=1, 4 examples of a batch on each"
    )
    assert "1,433 images to train on, 364 in eval; 44 steps an epoch, 8 in all" in line_of(lines, "ok", "data")
    assert line_of(lines, "ok", "dataset").endswith("10 classes of 139 to 146 images")
    assert re.search(r"train 32x8x8x3 in [\d.]+ s, eval 32x8x8x3 in", line_of(lines, "ok", "batches"))
    assert line_of(lines, "ok", "workdir").endswith("does not exist; the run will create it")
    assert line_of(lines, "ok", "checkpoint").endswith("none yet; the run starts with step 0")
    step = r"compiled in [\d.]+ s; needs [\d,.]+ MiB on a device, of which [\d,.]+ MiB only while it runs; [\d,.]+ MiB"
    assert re.search(step, line_of(lines, "ok", "step"))
    assert not (tmp_path / "new").exists()  # nothing was written

    before = listing(done)
    lines = tried(small(digits_dir), done, capsys, code=0)
    assert listing(done) == before
    assert line_of(lines, "ok", "checkpoint").endswith("that of step 8 fits; --workdir alone verifies it")
    assert "finished with step 8 of 8 and would only be evaluated" in line_of(lines, "warn", "checkpoint")
    assert line_of(lines, "skip", "step").endswith("left out by --no_compile")


FAILS: dict[str, tuple[dict[str, Any], str, str]] = {
    "config": ({"loop.eval_every": 0}, "loop.eval_every=0 must be at least 1", ""),
    "model": ({"model.num_heads": 5}, "model.num_heads=5 does not divide model.width=32", "state needs model"),
    "devices": (
        {"batch_size": 30},
        "batch_size=30 does not divide over mesh.data x mesh.fsdp = 8 devices; set it to 24 or 32",
        "state needs devices",
    ),
    "data": (
        {"data.name": "mnist"},
        "data.name='mnist' is not prepared in data.data_dir=.*; prepare it with: ",
        "batches needs data",
    ),
    "dataset": ({"model.num_classes": 12}, "model.num_classes=12, but data.name='digits' has 10 classes; set", ""),
    "optimizer": ({"optim.name": "adam"}, "optim.name='adam' is not one of adamw, lamb, sgd", "state needs optimizer"),
}


@pytest.mark.parametrize("name", FAILS)
def test_what_is_wrong_is_named_and_hides_nothing_else(name: str, digits_dir: pathlib.Path, capsys: Capsys) -> None:
    changes, message, skipped = FAILS[name]
    lines = tried(small(digits_dir, **changes), None, capsys)
    assert re.search(message, line_of(lines, "FAIL", name))
    assert lines[-1] == f"FAIL: {name}"
    assert skipped in [" ".join(line.split()[1:]) for line in lines if line.startswith("skip")] + [""]
    for other in FAILS.keys() - {name, "data", "dataset"}:
        line_of(lines, "ok", other)


def test_two_wrong_things_are_both_named(digits_dir: pathlib.Path, capsys: Capsys) -> None:
    lines = tried(small(digits_dir, **{"batch_size": -32, "optim.schedule": "linear"}), None, capsys)
    assert "batch_size=-32 must be at least 1" in line_of(lines, "FAIL", "config")
    assert "optim.schedule='linear' is not one of" in line_of(lines, "FAIL", "optimizer")
    line_of(lines, "ok", "model")


def test_classes_without_images_and_another_batch_size_are_warned_of(digits_dir: pathlib.Path, capsys: Capsys) -> None:
    changes = {"data.train_split": "train[:8]", "batch_size": 8, "data.virtual_shards": 1, "recipe_batch_size": 64}
    lines = tried(small(digits_dir, **changes), None, capsys, code=0)
    warning = line_of(lines, "warn", "dataset")
    assert re.search(r"\d classes of data.train_split have no image: ", warning)
    assert "batch_size=8, but this recipe was made for 64" in line_of(lines, "warn", "optimizer")


def test_a_checkpoint_of_another_model_is_compared_by_path(
    digits_dir: pathlib.Path, done: pathlib.Path, capsys: Capsys
) -> None:
    lines = tried(small(digits_dir, **{"model.width": 64}), done, capsys)
    failed = line_of(lines, "FAIL", "checkpoint")
    assert f"the checkpoint of step 8 in --workdir={done} is of another model or optimizer; use another" in failed
    differences = [line for line in lines if " saved, " in line]
    assert "  params/head/kernel: float32 (32, 10) saved, float32 (64, 10) in this model" in differences
    assert any(line.startswith("  ema/params/") for line in differences)
    assert any(line.startswith("  opt_state/") for line in differences)


def test_corrupt_metadata_are_skipped_or_fail_the_check(
    digits_dir: pathlib.Path, workdir: pathlib.Path, capsys: Capsys
) -> None:
    (workdir / "checkpoints" / "8" / "_CHECKPOINT_METADATA").write_text("{")
    lines = tried(small(digits_dir), workdir, capsys, code=0)
    assert "that of step 4 fits" in line_of(lines, "ok", "checkpoint")
    assert "step 8: its metadata cannot be read" in line_of(lines, "warn", "checkpoint")
    (workdir / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text("{")
    lines = tried(small(digits_dir), workdir, capsys)
    failed = line_of(lines, "FAIL", "checkpoint")
    assert "none is good: step 8: its metadata cannot be read" in failed
    assert failed.endswith("start over with --restart_if_corrupt")


def test_a_workdir_that_cannot_be_used(
    digits_dir: pathlib.Path, tmp_path: pathlib.Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    lines = tried(small(digits_dir), file, capsys)
    assert f"--workdir={file} cannot be written to (File exists); name" in line_of(lines, "FAIL", "workdir")
    lines = tried(small(digits_dir), file / "run", capsys)
    failed = line_of(lines, "FAIL", "workdir")
    assert f"--workdir={file}/run cannot be created, because {file} is no folder; name another one" in failed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with lock.acquire(tmp_path):
        lines = tried(small(digits_dir), tmp_path, capsys)
    failed = line_of(lines, "FAIL", "space")
    assert re.search(r"checkpoints need [\d,]+ bytes; 100 are free, 0 are theirs now; free some, name another", failed)
    failed = line_of(lines, "FAIL", "lock")
    assert f"is in use by process {os.getpid()} on " in failed
    assert failed.endswith("; wait for it, or name another one")
    assert lines[-1] == "FAIL: space, lock"
    line_of(lines, "ok", "workdir")


def test_a_step_that_does_not_fit_names_what_to_lower(
    digits_dir: pathlib.Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halvit_jax.cli.preflight._available_memory", lambda: (1000, "there"))
    lines = tried(small(digits_dir), None, capsys, whole=True)
    failed = line_of(lines, "FAIL", "step")
    assert failed.endswith(
        "MiB are there; lower batch_size, raise loop.accumulate or mesh.fsdp, or set model.remat=True"
    )
