"""What all doors (`python -m halvit_jax.<door>`) share: parsing flags, and answering bad input with one line.

Exit codes: 0 done; 1 done in part, or an error of ours with its traceback; 2 bad input; 3 the run cannot go on as it is
(not finite, or no checkpoint can be written); 70 stuck, or other processes were lost; 75 stopped by a signal, and the
same command goes on.
"""

import contextlib
import difflib
import logging as std_logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict

from halvit_jax.cli.malloc import keep_freed_memory
from halvit_jax.config import default_config
from halvit_jax.protocols import BAD_INPUT, BROKEN_RUN, STOPPED, DataError


def run(main: Callable[[list[str]], None]) -> None:
    """Parse the command line and call `main`; a wrong flag or config field ends the program with one line."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow only reads data here: none of its greetings,
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # nor its warning that results may vary
    keep_freed_memory()
    logging.set_verbosity(logging.WARNING)
    # Where a checkpoint cannot be written, asyncio says of each array what we say once of all.
    std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
    app.run(main, flags_parser=_parse)


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Errors inside are the user's to mend: say what they say, without a traceback, and exit with 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error))


@contextlib.contextmanager
def bad_data() -> Iterator[None]:
    """Bad data found while they are read end the program in the same way; other errors keep their traceback."""
    try:
        yield
    except DataError as error:
        fail(str(error))


@contextlib.contextmanager
def broken_run() -> Iterator[None]:
    """A run that cannot go on as it is says why, and ends."""
    from halvit_jax.training.checkpoint.checkpointer import SaveError

    try:
        yield
    except (ArithmeticError, SaveError) as error:
        fail(str(error), code=BROKEN_RUN)


def fail(message: str, *, code: int = BAD_INPUT) -> NoReturn:
    """End the program with this message."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def stopped(message: str) -> NoReturn:
    """End the program as one that was asked to stop."""
    print(f"stopped by {message}", flush=True)
    sys.exit(STOPPED)


def no_arguments(argv: list[str], hint: str) -> None:
    """Refuse what is neither a flag nor the value of one.

    Raises:
        ValueError: with a hint at what a flag looks like.
    """
    if argv[1:]:
        raise ValueError(f"unexpected arguments {argv[1:]}; {hint}")


def check_overrides(arguments: list[str], config: ConfigDict) -> None:
    """Refuse `--config.some.field` where the config has no such field.

    Raises:
        ValueError: with the nearest name there is.
    """
    known = field_names(config)
    for argument in arguments:
        if argument.startswith("--config."):
            name = argument.removeprefix("--config.").split("=")[0]
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"{name} is no field of the config; did you mean --config.{near}?")


def field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted names of all fields, e.g. model.width."""
    names: list[str] = []
    for name, value in config.items():
        names += field_names(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return names


def _parse(arguments: list[str]) -> list[str]:
    with bad_input():
        check_overrides(arguments, default_config())
        try:
            return flags.FLAGS(arguments)
        except flags.Error as error:
            lines = str(error).strip().splitlines()  # a config file's own error is the last line of its traceback
            reason = " ".join(dict.fromkeys([lines[0], lines[-1]]))
            raise ValueError(f"{reason}; --help lists the flags") from error
