"""What all commands share: checks of overrides, and one-line errors with their exit codes."""

import logging

import pytest
from helpers.processes import run_command

from halvit_jax.buckets import StorageError
from halvit_jax.cli import app
from halvit_jax.config import default_config
from halvit_jax.protocols import DataError
from halvit_jax.training.checkpoint.checkpointer import SaveError
from halvit_jax.training.fault_tolerance.nonfinite import NotFiniteError

Capsys = pytest.CaptureFixture[str]


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_bad_input_ends_the_program_with_one_line(error: type[Exception], capsys: Capsys) -> None:
    with pytest.raises(SystemExit) as ended, app.report_user_errors():
        raise error("batch_size=0 must be at least 1")
    assert ended.value.code == app.ExitCode.BAD_INPUT
    assert capsys.readouterr().err == "error: batch_size=0 must be at least 1\n"


def test_a_data_error_ends_the_program_with_one_line(capsys: Capsys) -> None:
    with pytest.raises(SystemExit) as ended, app.report_data_errors():
        raise DataError("photo.jpg cannot be decoded; remove it")
    assert ended.value.code == app.ExitCode.BAD_INPUT
    assert capsys.readouterr().err == "error: photo.jpg cannot be decoded; remove it\n"


@pytest.mark.parametrize(
    "error",
    [
        NotFiniteError("not finite at step 3: loss"),
        SaveError("the disk is full"),
        StorageError("gs://bucket/run/result.json cannot be reached"),
    ],
)
def test_a_nan_and_a_failed_checkpoint_end_the_program_with_exit_code_3(error: Exception, capsys: Capsys) -> None:
    with pytest.raises(SystemExit) as ended, app.report_fatal_run():
        raise error
    assert ended.value.code == app.ExitCode.FATAL_RUN == 3
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("report", [app.report_data_errors, app.report_fatal_run])
def test_other_errors_keep_their_traceback(report: object) -> None:
    with pytest.raises(RuntimeError, match="a fault"), report():
        raise RuntimeError("a fault")


def test_preemption_ends_the_program_with_exit_code_75(capsys: Capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        app.stopped("SIGTERM: saved at step 4")
    assert ended.value.code == app.ExitCode.PREEMPTED == 75
    assert capsys.readouterr().out == "stopped by SIGTERM: saved at step 4\n"


def test_an_unknown_override_is_refused_with_the_nearest_name() -> None:
    app.check_overrides(["prog", "--config.model.width=3", "--config=x.py", "--workdir=y"], default_config())
    with pytest.raises(ValueError, match=r"model.widht is not a field .*; did you mean --config.model.width"):
        app.check_overrides(["--config.model.widht=3"], default_config())


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("optim.lr", "optim.learning_rate"),
        ("bs", "batch_size"),
        ("epochs", "num_epochs"),
        ("data.image_dir", "data.root"),
        ("wd", "optim.weight_decay"),
    ],
)
def test_names_of_other_libraries_are_understood(given: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"{given} is not a field of the config; did you mean --config.{meant}\?"):
        app.check_overrides([f"--config.{given}=1"], default_config())


def test_every_synonym_names_a_field() -> None:
    assert set(app.SYNONYMS.values()) <= set(app.field_names(default_config()))


def test_a_field_that_a_config_sets_can_be_unset() -> None:
    given, unset = app._split_unset(["main", "--config=x.py", "--config.model.image_size=None", "--config.seed=1"])
    assert (given, unset) == (["main", "--config=x.py", "--config.seed=1"], ["model.image_size"])
    with pytest.raises(ValueError, match=r"--config.batch_size=None: the field cannot be None; its default is 128"):
        app._split_unset(["--config.batch_size=None"])


def test_an_unset_field_is_none_in_the_config() -> None:
    """The dry run prints the size that the table of models has, not the digits' 8x8."""
    flags = ("--config=configs/halvit_digits.py", "--config.model.image_size=None", "--config.model.patch_size=None")
    done = run_command("halvit_jax.check", *flags, "--no_compile", "--config.data.name=mnist", code=2)
    assert "images of 224x224" in done.stdout


def test_warnings_of_the_package_are_lines_that_come_once(capsys: Capsys) -> None:
    logger = logging.Logger("halvit_jax.data")
    logger.addHandler(app.WarningLines())
    for files in (3, 3, 4):
        logger.warning("%d files passed over", files)
    assert capsys.readouterr().out == "WARNING: 3 files passed over\nWARNING: 4 files passed over\n"


def test_help_ends_with_0_and_says_where_the_fields_are() -> None:
    printed = run_command("halvit_jax.main", "--help").stdout
    assert "--config.some.field=value; docs/configuration.md lists the fields" in " ".join(printed.split())
