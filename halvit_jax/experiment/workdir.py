"""Files of a workdir: their names in one table, and reading and writing them."""

import contextlib
import json
import os
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from halvit_jax import config as config_lib
from halvit_jax.protocols import DatasetInfo
from halvit_jax.training.checkpoint.manifest import CORRUPT_FOLDER, FOLDER

CONFIG_FILE = "config.json"  # the config of the run
DATASET_FILE = "dataset.json"  # the training set's DatasetInfo, such as class names
RESULT_FILE = "result.json"  # metrics of the finished run
INIT_FROM_FILE = "init_from.json"  # with init_from: every path, and whether it was loaded
TEACHER_FILE = "teacher.json"  # with a teacher: the digest of its weights
LOCK_FILE = "lock.json"  # the process that trains here
CHECKPOINT_FOLDER = FOLDER  # a folder for each step, sealed by a manifest.json
CORRUPT_CHECKPOINT_FOLDER = CORRUPT_FOLDER  # checkpoints that did not verify, moved away
DEBUG_FOLDER = "debug"  # batches and thread stacks of a failed run
PROFILE_FOLDER = "profile"  # traces of --profile
# Beside them: TensorBoard's event files.


def create_workdir(workdir: pathlib.Path) -> None:
    """Create the workdir if it is missing, and test that it can be written to.

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


def write_run_metadata(workdir: pathlib.Path, config: ConfigDict, info: DatasetInfo) -> None:
    """Write what `load_trained` needs beside the checkpoint: the config and the `DatasetInfo`."""
    if jax.process_index():
        return
    (workdir / CONFIG_FILE).write_text(config_lib.to_json(config) + "\n")
    (workdir / DATASET_FILE).write_text(json.dumps(info._asdict() | {"extra": dict(info.extra)}, indent=2) + "\n")


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config that a workdir was trained with.

    Raises:
        ValueError: the workdir has none, so no run has started there.
    """
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{workdir} is not the workdir of a run: it has no {CONFIG_FILE}")
    return config_lib.from_json(path.read_text())


def read_dataset_info(workdir: pathlib.Path) -> DatasetInfo:
    """The `DatasetInfo` that a workdir was trained on."""
    return DatasetInfo(**json.loads((workdir / DATASET_FILE).read_text()))


def write_result(workdir: pathlib.Path, result: dict[str, Any]) -> None:
    """Write the result of a finished run; a run that is only evaluated again keeps its speed."""
    if jax.process_index():
        return
    path = workdir / RESULT_FILE
    if result["images_per_s"] is None and path.is_file():
        result = {**result, "images_per_s": json.loads(path.read_text())["images_per_s"]}
    path.write_text(json.dumps(result, indent=2) + "\n")


def directory_size(folder: pathlib.Path) -> int:
    """Bytes of all files in a folder, some of which may vanish while they are counted."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
