"""The command that verifies a workdir and dry-runs a config: every line of it."""

import json
import os
import pathlib
import re
import shutil

import pytest
from helpers.processes import run_command
from helpers.workdirs import flip, largest_file, listing

from halvit_jax import check
from halvit_jax.experiment import lock
from halvit_jax.training.checkpoint import manifest

CHECK = "halvit_jax.check"
Capsys = pytest.CaptureFixture[str]


def verified(workdir: pathlib.Path, capsys: Capsys, *, code: int, files_only: bool = False) -> list[str]:
    """The lines of a verification that ends with this code."""
    capsys.readouterr()
    before = listing(workdir)
    assert check.verify(workdir, files_only=files_only) == code
    assert listing(workdir) == before
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("files_only", [False, True])
def test_a_good_workdir_is_verified(files_only: bool, workdir: pathlib.Path, capsys: Capsys) -> None:
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
def test_an_unsealed_checkpoint_passes_by_its_arrays_alone(workdir: pathlib.Path, capsys: Capsys) -> None:
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
    with pytest.raises(ValueError, match=r"is not a folder; name the workdir of a run"):
        check.verify(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is not the workdir of a run: it has neither checkpoints nor config.json"):
        check.verify(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --workdir=DIR to verify its checkpoints, --config=configs/NAME.py to dry-run it"),
        (["--workdir=/nowhere"], "--workdir=/nowhere is not a folder"),
        (["--workdir=/nowhere", "--no_compile"], "--no_compile goes with --config"),
        (["--config=configs/halvit_digits.py", "--files_only"], "--files_only goes without --config"),
        (["stray"], "unexpected arguments ['stray']"),
    ],
)
def test_a_bad_command_line_is_refused_with_one_line(arguments: list[str], message: str) -> None:
    error = run_command(CHECK, *arguments, code=2).stderr
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_command_answers_with_its_exit_code(workdir: pathlib.Path) -> None:
    flip(largest_file(workdir, 8))
    done = run_command(CHECK, f"--workdir={workdir}", "--files_only", code=1)
    assert "2 checkpoints, 1 good; corrupt: step 8" in done.stdout
    assert done.stderr == ""
