"""Config files by name: `--config=halvit_tiny` and `--config=shvit:s4` beside a path, and the configs of runs.

Read as a config file itself, this module gives the config.json of a run.
"""

import difflib
import os
import pathlib
import traceback

from ml_collections import ConfigDict

from halvit_jax import config as config_lib

_PACKAGE = pathlib.Path(__file__).parents[1]
# A clone has the folder beside the package, a wheel inside it.
_FOLDER = _PACKAGE.parent / "configs" if (_PACKAGE.parent / "configs").is_dir() else _PACKAGE / "configs"
FILES = {path.stem: path for path in sorted(_FOLDER.glob("[!_]*.py"))}
"""The project's own config files by name."""


def resolve(config: str) -> str:
    """The path of a config file, with the variant after ":", from its path or its name.

    A path that exists is taken as it is, and a workdir or its config.json as the config of that run. "configs/NAME.py"
    means the project's own file from any folder.

    Raises:
        ValueError: neither a file nor a name, with the nearest name.
    """
    given, colon, variant = config.partition(":")
    saved = os.path.join(given, "config.json") if os.path.isdir(given) else given
    if saved.endswith(".json") and os.path.isfile(saved):
        return f"{__file__}:{os.path.abspath(saved)}"
    if os.path.isfile(given):
        return config
    path = pathlib.Path(given)
    own = path.suffix in ("", ".py") and str(path.parent) in (".", "configs")
    if own and path.stem in FILES:
        return f"{FILES[path.stem]}{colon}{variant}"
    near = difflib.get_close_matches(path.stem, FILES, n=1)
    hint = f"did you mean --config={near[0]}{colon}{variant}?" if near else f"the names are {', '.join(FILES)}"
    raise ValueError(f"--config={config} is neither a file nor the name of a config; {hint}")


def get_config(saved: str) -> ConfigDict:
    """The config of a run, from its config.json."""
    return config_lib.from_json(pathlib.Path(saved).read_text())


def explain(error: Exception) -> str:
    """What is wrong in a config file that raised this: its line, and the error."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "ml_collections" not in frame.filename]
    place = frames[-1]
    where = f"{place.filename}, line {place.lineno}: " if place.name in ("get_config", "<module>") else ""
    return f"{where}{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def resolve_flags(arguments: list[str]) -> list[str]:
    """The command line with the value of --config replaced by what `resolve` gives.

    Raises:
        ValueError: as `resolve`.
    """
    resolved, follows = [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if follows:
            argument = resolve(argument)
        elif equals and flag in ("--config", "-config"):
            argument = f"--config={resolve(value)}"
        follows = not equals and flag in ("--config", "-config")
        resolved.append(argument)
    return resolved
