"""The door that looks at a run before and after it: every line it has for what is wrong."""

import json
import os
import pathlib
import re
import shutil
import sys
from typing import Any

import pytest
from ml_collections import ConfigDict
from test_main import run_door, tiny

from halvit_jax import check, door, lock
from halvit_jax.main import work
from halvit_jax.preflight import preflight
from halvit_jax.training import manifest

CHECK = [sys.executable, "-m", "halvit_jax.check"]
Capsys = pytest.CaptureFixture[str]


def small(digits_dir: pathlib.Path, **changes: Any) -> ConfigDict:
    """One block, two steps, a checkpoint of each."""
    fields = {"total_steps": 2, "log_every": 1, "eval_every": 2, "checkpoint_every": 1, "model.depth": 1}
    return tiny(digits_dir, **fields | changes)


@pytest.fixture(scope="module")
def finished(digits_dir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A workdir with checkpoints of the steps 1 and 2; only the second has a score."""
    workdir = tmp_path_factory.mktemp("finished")
    work(small(digits_dir), workdir)
    return workdir


@pytest.fixture
def workdir(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of it to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def verified(workdir: pathlib.Path, capsys: Capsys, *, code: int, files_only: bool = False) -> list[str]:
    """The lines of a verification that ends with this code."""
    capsys.readouterr()
    before = listing(workdir)
    assert check.verify(workdir, files_only=files_only) == code
    assert listing(workdir) == before
    return capsys.readouterr().out.splitlines()


def tried(config: ConfigDict, workdir: pathlib.Path | None, capsys: Capsys, *, code: int = 2, **how: Any) -> list[str]:
    """The lines of a preflight that ends with this code; without compiling, for that takes longest."""
    capsys.readouterr()
    assert preflight(config, workdir, **{"compile_step": False, **how}) == code
    return capsys.readouterr().out.splitlines()


def line_of(lines: list[str], verdict: str, name: str) -> str:
    """What was said of one item."""
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
        "step 1  good",
        f"step 2  good, score {score:.6g}",
        "2 checkpoints, 2 good",
        "a run would go on from step 2",
    ]


@pytest.mark.parametrize("files_only", [False, True])
def test_a_flipped_bit_and_a_deleted_file_are_named(files_only: bool, workdir: pathlib.Path, capsys: Capsys) -> None:
    flip(largest_file(workdir, 2))
    lines = verified(workdir, capsys, code=1, files_only=files_only)
    pattern = rf"step 2  damaged: {re.escape(str(largest_file(workdir, 2)))} has the digest \w{{16}}, expected \w{{16}}"
    assert re.fullmatch(pattern, lines[2])
    assert lines[3:] == ["2 checkpoints, 1 good; damaged: step 2", "a run would go on from step 1"]
    lost = largest_file(workdir, 1)
    lost.unlink()
    lines = verified(workdir, capsys, code=1, files_only=files_only)
    assert lines[1] == f"step 1  damaged: {lost} is missing"
    assert lines[3:] == [
        "2 checkpoints, 0 good; damaged: step 1, step 2",
        "no checkpoint is good; begin anew with --restart_if_damaged, or in another --workdir",
    ]


# Orbax leaves the other reads behind when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_step_that_was_not_sealed_passes_by_its_arrays_alone(workdir: pathlib.Path, capsys: Capsys) -> None:
    manifest.unseal(workdir / "checkpoints" / "2")
    unsealed = "step 2  not sealed (the run ended while it was written); its arrays "
    line = verified(workdir, capsys, code=0)[2]
    assert line.startswith(f"{unsealed}verify, score ")
    line = verified(workdir, capsys, code=0, files_only=True)[2]
    assert line.startswith(f"{unsealed}were not looked at, score ")
    for path in (workdir / "checkpoints" / "2" / "default").rglob("*"):
        if path.is_file():  # all, for some are not read
            flip(path)
    lines = verified(workdir, capsys, code=1)
    assert lines[2].startswith(f"{unsealed}do not verify: ")
    assert lines[-1] == "a run would go on from step 1"


def test_a_config_that_cannot_be_read_leaves_the_files_to_be_verified(workdir: pathlib.Path, capsys: Capsys) -> None:
    (workdir / "config.json").write_text("{")
    lines = verified(workdir, capsys, code=1)
    assert lines[1].startswith("config.json  damaged: ")
    assert lines[1].endswith("; so the arrays were not verified")
    assert lines[2] == "step 1  good"
    assert lines[4] == "2 checkpoints, 2 good; damaged: config.json"


def test_a_checkpoint_that_does_not_fit_its_config_is_no_good(workdir: pathlib.Path, capsys: Capsys) -> None:
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["width"] = 64
    (workdir / "config.json").write_text(json.dumps(config))
    lines = verified(workdir, capsys, code=1)
    assert lines[1].startswith("step 1  cannot be restored: the checkpoint of step 1")
    assert any(line.endswith("scale: float32 (32,) saved, float32 (64,) in this model") for line in lines)


def test_leftovers_and_the_lock_are_named(workdir: pathlib.Path, capsys: Capsys) -> None:
    unfinished = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    aside = workdir / "damaged" / "1"
    for folder in (unfinished, aside):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"12345")
    lines = verified(workdir, capsys, code=0)
    assert "leftover  checkpoints/3.orbax-checkpoint-tmp, 5 bytes: an unfinished save; the next run removes it" in lines
    assert "leftover  damaged/1, 5 bytes: a damaged checkpoint set aside; delete it when you like" in lines
    with lock.held(workdir):
        manifest.unseal(workdir / "checkpoints" / "2")
        shutil.rmtree(workdir / "checkpoints" / "2" / "default")
        lines = verified(workdir, capsys, code=0)
        assert lines[0].startswith(f"lock  held by process {os.getpid()} on ")
        assert "step 2  is being written or deleted by the run" in lines
        assert any(line.endswith("perhaps under way now") for line in lines)
        with pytest.raises(ValueError, match="in use by process"), lock.held(workdir):  # it has not been let go
            pass
    with lock.held(workdir):  # nor is it kept
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
        ([], "give --workdir=DIR to verify its checkpoints, --config=configs/NAME.py to try a run"),
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
    assert ended.value.code == door.BAD_INPUT
    assert message in capsys.readouterr().err


def test_the_command_answers_with_its_exit_code(workdir: pathlib.Path) -> None:
    flip(largest_file(workdir, 2))
    done = run_door(*CHECK, f"--workdir={workdir}", "--files_only", code=1)
    assert "2 checkpoints, 1 good; damaged: step 2" in done.stdout
    assert done.stderr == ""
