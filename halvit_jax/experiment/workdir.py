"""Files of a workdir: their names in one table, and reading and writing them."""

import contextlib
import json
import os
import re
from typing import Any

import jax
from ml_collections import ConfigDict

from halvit_jax import config as config_lib
from halvit_jax import storage
from halvit_jax.buckets import BucketPath
from halvit_jax.protocols import DatasetInfo
from halvit_jax.storage import Path
from halvit_jax.training.checkpoint.manifest import CORRUPT_FOLDER, FOLDER

CONFIG_FILE = "config.json"  # the config of the run; before it was changed at step N: config.step_N.json
DATASET_FILE = "dataset.json"  # the training set's DatasetInfo, such as class names
CATEGORIES_FILE = "categories.json"  # of detection: id and name of each label, in order
EVALS_FILE = "evals.jsonl"  # a line for each --mode=eval: the step, the data and the metrics
RESULT_FILE = "result.json"  # metrics of the finished run
PAGE_FILE = "report.html"  # the finished run on one page
INIT_FROM_FILE = "init_from.json"  # with init_from: every path, and whether it was loaded
TEACHER_FILE = "teacher.json"  # with a teacher: the digest of its weights
LOCK_FILE = "lock.json"  # the process that trains here
CHECKPOINT_FOLDER = FOLDER  # a folder for each step, sealed by a manifest.json
CORRUPT_CHECKPOINT_FOLDER = CORRUPT_FOLDER  # checkpoints that did not verify, moved away
DEBUG_FOLDER = "debug"  # batches and stacks of a run that ended badly
BEST = "best"  # of all steps; as in the checkpointer, whose module takes seconds to import
SMOKE_FOLDER = "smoke"  # the workdir of --smoke
PROFILE_FOLDER = "profile"  # traces of --profile
# Beside them: TensorBoard's event files.


def parse_step(text: str | None) -> int | str | None:
    """The step that a flag names: a number, "best", or None for the newest.

    Raises:
        ValueError: neither.
    """
    if text is None or text == BEST:
        return text
    if not text.isdecimal():
        raise ValueError(f"--step={text} must be the step of a checkpoint, or {BEST}")
    return int(text)


def split_source(source: str) -> tuple[str, int | str | None]:
    """The workdir or file that a field such as `init_from` names, and its step: "runs/a@best", "runs/a@1200"."""
    found = re.fullmatch(rf"(.+)@({BEST}|\d+)", source)
    elsewhere = "://" in source and not storage.is_bucket(source)  # on the Hub, where @ is a revision
    if found is None or elsewhere or os.path.exists(source):
        return os.path.expanduser(source), None
    return os.path.expanduser(found[1]), parse_step(found[2])


def saved_steps(workdir: Path) -> list[int]:
    """The steps that have a checkpoint, good or corrupt, in order."""
    found = [path for path in (workdir / CHECKPOINT_FOLDER).glob("*") if path.name.isdigit()]
    return sorted(int(path.name) for path in found if storage.is_committed(path))


def create_workdir(workdir: Path) -> None:
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
        raise ValueError(
            f"--workdir={workdir} cannot be written to ({error.strerror or error}); name another one"
        ) from error


def write_run_metadata(workdir: Path, config: ConfigDict, info: DatasetInfo, *, resumed_at: int = 0) -> None:
    """Write what `load_trained` needs beside the checkpoint: the config and the data set's facts.

    A config that was another one until the step `resumed_at` is kept.
    """
    if jax.process_index():
        return
    path, text = workdir / CONFIG_FILE, config_lib.to_json(config) + "\n"
    before = path.read_text() if resumed_at and path.is_file() else text
    if before != text:
        storage.write_text(path.with_suffix(f".step_{resumed_at}.json"), before)
    storage.write_text(path, text)
    storage.write_text(
        workdir / DATASET_FILE, json.dumps(info._asdict() | {"extra": dict(info.extra)}, indent=2) + "\n"
    )
    if "category_ids" in info.extra:
        pairs = zip(info.extra["category_ids"], info.class_names, strict=True)
        listed = [{"id": number, "name": name} for number, name in pairs]
        storage.write_text(workdir / CATEGORIES_FILE, json.dumps(listed, indent=2) + "\n")


def read_config(workdir: Path) -> ConfigDict:
    """The config that a workdir was trained with.

    Raises:
        ValueError: there is none, so no run has started here; or it is damaged.
    """
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{workdir} is not the workdir of a run: it has no {CONFIG_FILE}")
    try:
        return config_lib.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_dataset_info(workdir: Path) -> DatasetInfo:
    """The facts of the data set that a workdir was trained on.

    Raises:
        ValueError: the file is damaged.
    """
    return DatasetInfo(**read_json(workdir / DATASET_FILE))


def write_result(workdir: Path, result: dict[str, Any]) -> None:
    """Write the result of a finished run; a run that is only evaluated again keeps its speed."""
    if jax.process_index():
        return
    path = workdir / RESULT_FILE
    if result["images_per_s"] is None and path.is_file():
        result = {**result, "images_per_s": read_json(path).get("images_per_s")}
    storage.write_text(path, json.dumps(result, indent=2) + "\n")


def set_aside_result(workdir: Path, *, resumed_at: int) -> None:
    """Keep the result of a finished run that is trained on under another name: it is not that of the longer run."""
    path = workdir / RESULT_FILE
    if jax.process_index() == 0 and path.is_file():
        storage.move_file(path, path.with_suffix(f".step_{resumed_at}.json"))


def append_evaluation(workdir: Path, evaluation: dict[str, Any]) -> None:
    """Add an evaluation of a checkpoint to those that were made before."""
    if jax.process_index() == 0:
        storage.append_line(workdir / EVALS_FILE, json.dumps(evaluation))


def directory_size(folder: Path) -> int:
    """Bytes of all files in a folder, some of which may vanish while they are counted."""
    if isinstance(folder, BucketPath):
        return sum(storage.files_below(folder).values())
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
