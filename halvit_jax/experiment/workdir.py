"""The files of a workdir: one table of their names, and reading and writing them."""

import json
import pathlib
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import ConfigDict

from halvit_jax import config as config_lib

if TYPE_CHECKING:
    pass


CONFIG_FILE, CLASSES_FILE, RESULT_FILE = "config.json", "classes.json", "result.json"


def create_workdir(workdir: pathlib.Path) -> None:
    """Make the workdir if it is missing, and try whether it can be written to.

    Raises:
        ValueError: it cannot.
    """
    probe = workdir / f".probe_{jax.process_index()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--workdir={workdir} cannot be written to ({error.strerror}); name another one") from error


def write_run_metadata(workdir: pathlib.Path, config: ConfigDict, class_names: list[str]) -> None:
    """What `load_trained` needs beside the checkpoint: the config and the class names, as JSON in the workdir."""
    if jax.process_index():
        return
    (workdir / CONFIG_FILE).write_text(config_lib.to_json(config) + "\n")
    (workdir / CLASSES_FILE).write_text(json.dumps(class_names) + "\n")


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config a workdir was trained with.

    Raises:
        ValueError: there is none, so no run has begun here.
    """
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{workdir} is no workdir of a run: it has no {CONFIG_FILE}")
    return config_lib.from_json(path.read_text())


def write_result(workdir: pathlib.Path, result: dict[str, Any]) -> None:
    """The result of a finished run, as JSON in the workdir; a run that is only evaluated again keeps its speed."""
    if jax.process_index():
        return
    path = workdir / RESULT_FILE
    if result["images_per_s"] is None and path.is_file():
        result = {**result, "images_per_s": json.loads(path.read_text())["images_per_s"]}
    path.write_text(json.dumps(result, indent=2) + "\n")
