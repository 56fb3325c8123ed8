"""Config files by name: `--config=halvit_tiny` and `--config=shvit:s4` beside a path."""

import difflib
import os
import pathlib

_PACKAGE = pathlib.Path(__file__).parents[1]
# A clone has the folder beside the package, a wheel inside it.
_FOLDER = _PACKAGE.parent / "configs" if (_PACKAGE.parent / "configs").is_dir() else _PACKAGE / "configs"
FILES = {path.stem: path for path in sorted(_FOLDER.glob("[!_]*.py"))}
"""The project's own config files by name."""


def resolve(config: str) -> str:
    """The path of a config file, with the variant after ":", from its path or its name.

    A path that exists is taken as it is. "configs/NAME.py" means the project's own file from any folder.

    Raises:
        ValueError: neither a file nor a name, with the nearest name.
    """
    given, colon, variant = config.partition(":")
    if os.path.isfile(given):
        return config
    path = pathlib.Path(given)
    own = path.suffix in ("", ".py") and str(path.parent) in (".", "configs")
    if own and path.stem in FILES:
        return f"{FILES[path.stem]}{colon}{variant}"
    near = difflib.get_close_matches(path.stem, FILES, n=1)
    hint = f"did you mean --config={near[0]}{colon}{variant}?" if near else f"the names are {', '.join(FILES)}"
    raise ValueError(f"--config={config} is neither a file nor the name of a config; {hint}")


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
