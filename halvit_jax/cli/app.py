"""Shared by all commands: flag parsing and one-line errors for bad input. `protocols.ExitCode` lists the exit codes."""

import contextlib
import difflib
import logging as std_logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict

from halvit_jax.buckets import StorageError
from halvit_jax.cli.config_files import explain, resolve_flags
from halvit_jax.cli.malloc import keep_freed_memory
from halvit_jax.cli.startup import ignore_signals
from halvit_jax.config import default_config
from halvit_jax.protocols import DataError, ExitCode

SYNONYMS = {  # names of other libraries
    **dict.fromkeys(("lr", "base_lr", "peak_lr"), "optim.learning_rate"),
    **dict.fromkeys(("wd", "decay"), "optim.weight_decay"),
    **dict.fromkeys(("bs", "batch", "train_batch_size"), "batch_size"),
    **dict.fromkeys(("epochs", "max_epochs", "num_train_epochs"), "num_epochs"),
    **dict.fromkeys(("steps", "max_steps", "num_steps", "num_train_steps"), "total_steps"),
    **dict.fromkeys(("dataset", "dataset_name"), "data.name"),
    **dict.fromkeys(("image_dir", "data_path", "train_dir", "folder"), "data.root"),
    **dict.fromkeys(("img_size", "resolution", "input_size"), "model.image_size"),
    **dict.fromkeys(("nb_classes", "n_classes", "classes"), "model.num_classes"),
    **dict.fromkeys(("pretrained", "checkpoint", "finetune", "resume"), "init_from"),
    **dict.fromkeys(("optimizer", "opt"), "optim.name"),
    **dict.fromkeys(("warmup", "warmup_steps"), "optim.warmup_epochs"),
    **dict.fromkeys(("grad_clip", "clip_grad", "max_grad_norm"), "optim.clip_norm"),
    **dict.fromkeys(("ema", "model_ema"), "loop.ema_decay"),
    **dict.fromkeys(("smoothing",), "classification.label_smoothing"),
}


def run(main: Callable[[list[str]], None]) -> None:
    """Parse the command line and call `main`; a wrong flag or config field ends the program with one line."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hide TensorFlow's start-up messages
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # and its warning that results may vary
    keep_freed_memory()
    logging.set_verbosity(logging.WARNING)
    # If a checkpoint cannot be written, asyncio logs each array; the Checkpointer logs it once.
    std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
    own = std_logging.getLogger("halvit_jax")
    own.addHandler(WarningLines())
    own.setLevel(std_logging.WARNING)  # also where a command silences what other packages log
    own.propagate = False
    if sys.argv[1:] in (["--help"], ["-h"]):
        app.define_help_flags()
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=ExitCode.DONE)
    try:
        app.run(main, flags_parser=_parse)
    finally:  # the exit code stands, whatever comes while Python shuts down
        ignore_signals()


class WarningLines(std_logging.Handler):
    """Prints the warnings of this package as lines like those of a run, over its live line, and each only once."""

    def __init__(self) -> None:
        super().__init__()
        self._printed: set[str] = set()

    def emit(self, record: std_logging.LogRecord) -> None:
        """Print a record, unless its text was printed before."""
        text = f"{record.levelname}: {record.getMessage()}"
        if text not in self._printed:
            self._printed.add(text)
            print(("\r\033[K" if sys.stdout.isatty() else "") + text, flush=True)


@contextlib.contextmanager
def report_user_errors() -> Iterator[None]:
    """Turn a ValueError or OSError into a one-line message and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error))


@contextlib.contextmanager
def report_data_errors() -> Iterator[None]:
    """Turn a DataError into a one-line message and exit code 2; other errors keep their traceback."""
    try:
        yield
    except DataError as error:
        fail(str(error))


@contextlib.contextmanager
def report_fatal_run() -> Iterator[None]:
    """Turn an error that ends a run (not finite, not saved, a lost bucket) into one line and exit code 3."""
    from halvit_jax.training.checkpoint.checkpointer import SaveError

    try:
        yield
    except (ArithmeticError, SaveError, StorageError) as error:
        fail(str(error), code=ExitCode.FATAL_RUN)


def fail(message: str, *, code: int = ExitCode.BAD_INPUT) -> NoReturn:
    """End the program with this message."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def stopped(message: str) -> NoReturn:
    """End the program after a stop request."""
    print(f"stopped by {message}", flush=True)
    sys.exit(ExitCode.PREEMPTED)


def reject_positional_args(argv: list[str], hint: str) -> None:
    """Refuse arguments that are not flags.

    Raises:
        ValueError: with a hint at what a flag looks like.
    """
    if argv[1:]:
        raise ValueError(f"unexpected arguments {argv[1:]}; {hint}")


def check_overrides(arguments: list[str], config: ConfigDict) -> None:
    """Refuse `--config.some.field` if the config has no such field.

    Raises:
        ValueError: with the nearest name there is.
    """
    known = field_names(config)
    for argument in arguments:
        if argument.startswith("--config."):
            name = argument.removeprefix("--config.").split("=")[0]
            if name not in known:
                raise ValueError(f"{name} is not a field of the config; did you mean --config.{_meant(name, known)}?")


def field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted names of all fields, e.g. model.width."""
    names: list[str] = []
    for name, value in config.items():
        names += field_names(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return names


def config_value(config: ConfigDict, name: str) -> Any:
    """The field or sub-tree of a dotted name; "" is the whole config."""
    for part in filter(None, name.split(".")):
        config = config[part]
    return config


def _split_unset(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without `--config.some.field=None`, and the names of these fields, which the config may have set.

    Raises:
        ValueError: a field that cannot be None.
    """
    unset = [argument.removeprefix("--config.").removesuffix("=None") for argument in arguments if _unsets(argument)]
    for name in unset:
        value = config_value(default_config(), name)
        if value is not None:
            raise ValueError(f"--config.{name}=None: the field cannot be None; its default is {value!r}")
    return [argument for argument in arguments if not _unsets(argument)], unset


def _unsets(argument: str) -> bool:
    return argument.startswith("--config.") and argument.endswith("=None")


def _meant(name: str, known: list[str]) -> str:
    """The field that a wrong name stands for: by its usual meaning elsewhere, else the one that is spelt most alike."""
    word = name.rpartition(".")[2].lower()
    return SYNONYMS.get(word) or difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _parse(arguments: list[str]) -> list[str]:
    with report_user_errors():
        check_overrides(arguments, default_config())
        if "config" in flags.FLAGS:
            arguments = resolve_flags(arguments)
        given, unset = _split_unset(arguments)
        try:
            rest = flags.FLAGS(given)
            for name in unset:
                tree, _, field = name.rpartition(".")
                config_value(flags.FLAGS.config, tree)[field] = None
            return rest
        except flags.Error as error:
            lines = str(error).strip().splitlines()  # a config file's own error is the last line of its traceback
            reason = " ".join(dict.fromkeys([lines[0], lines[-1]]))
            raise ValueError(f"{reason}; --help lists the flags") from error
        except Exception as error:  # of any kind: a config file is a program
            raise ValueError(f"the config file cannot be read: {explain(error)}") from error
