"""List installed and missing packages, with the commands that install them.

    halvit doctor [--data_dir=DIR]

Prints the versions, the devices that JAX finds, the data sets of TFDS that are prepared, and each extra. Exit code 1 if
a required package is missing or too old.
"""

import importlib.metadata
import os
import pathlib
import platform
import re
import sys
from collections.abc import Iterator

from absl import flags
from packaging.requirements import Requirement

from halvit_jax.cli import app
from halvit_jax.protocols import ExitCode
from halvit_jax.text import pip_install

DISTRIBUTION = "halvit_jax"


def define_flags() -> None:
    """Define the command-line flags."""
    flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "Folder of TFDS's prepared data sets.")


def main(argv: list[str]) -> None:
    """Print the report."""
    with app.report_user_errors():
        app.reject_positional_args(argv, "give flags only")
        data_dir = flags.FLAGS.data_dir
    print(f"halvit_jax {importlib.metadata.version(DISTRIBUTION)}, Python {platform.python_version()}")
    packages = list(package_lines())
    lines = [line for _, line in packages] + device_lines() + data_lines(pathlib.Path(data_dir).expanduser())
    print("\n".join(lines))
    sys.exit(ExitCode.PARTLY if any(missing for missing, _ in packages) else ExitCode.DONE)


def package_lines() -> Iterator[tuple[bool, str]]:
    """(a required package is missing, a line), for the required packages and for each extra."""
    required, extras = requirements()
    for requirement in required:
        problem = lacking(requirement)
        if problem:
            yield True, f"  missing   {problem}: {pip_install(str(requirement))}"
        else:
            yield False, f"  installed {requirement.name} {importlib.metadata.version(requirement.name)}"
    for extra, needed in sorted(extras.items()):
        problems = [problem for requirement in needed if (problem := lacking(requirement))]
        if problems:
            yield False, f"  extra     {extra}: {', '.join(problems)}: {pip_install(*map(str, needed))}"
        else:
            yield False, f"  extra     {extra}: complete"


def requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """The required packages, and those of each extra, as the installed metadata lists them."""
    required: list[Requirement] = []
    extras: dict[str, list[Requirement]] = {}
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        found = re.search(r"extra == [\"'](\w+)[\"']", str(requirement.marker or ""))
        requirement.marker = None
        (extras.setdefault(found[1], []) if found else required).append(requirement)
    return required, extras


def lacking(requirement: Requirement) -> str:
    """The problem of an installed package, or ""."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    return "" if requirement.specifier.contains(version, prereleases=True) else f"{requirement.name} is {version}"


def device_lines() -> list[str]:
    """One line for the devices that JAX finds, or for the reason why it finds none."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return [f"  devices   none: {error}"]
    kinds = sorted({device.device_kind for device in devices})
    return [f"  devices   {len(devices)} {devices[0].platform} ({', '.join(kinds)}), {os.cpu_count()} CPU cores"]


def data_lines(data_dir: pathlib.Path) -> list[str]:
    """One line for each data set that is prepared in a folder of TFDS."""
    found = sorted({path.parent.parent.relative_to(data_dir) for path in data_dir.glob("*/**/dataset_info.json")})
    if not found:
        return [f"  data      none prepared in {data_dir}; see launch/prepare_imagenet.sh"]
    return [f"  data      {name} in {data_dir}" for name in found]


if __name__ == "__main__":
    define_flags()
    app.run(main)
