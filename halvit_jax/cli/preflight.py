"""Dry run of a config: checks everything that a run needs before its first step; nothing is trained.

The second half of the command `check`. One line per check; a failed check does not stop independent ones.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from halvit_jax import config as config_lib
from halvit_jax import distributed, storage
from halvit_jax.analysis.hlo import memory_of
from halvit_jax.buckets import BucketPath
from halvit_jax.experiment import build, init_from, lock, resume, tasks, teacher
from halvit_jax.experiment import workdir as files
from halvit_jax.protocols import ExitCode, PyTree
from halvit_jax.storage import Path
from halvit_jax.training.checkpoint.manifest import CorruptCheckpointError
from halvit_jax.training.fault_tolerance.grad_spikes import make_guard
from halvit_jax.training.sharding import bytes_of
from halvit_jax.training.step import abstract_batch
from halvit_jax.trees import count, flatten

MAX_DECODED = 2_000  # examples of a split up to which all its images are decoded
MAX_COUNTED = 10_000  # examples up to which the records of a training split are read once
MEMORY_HINT = "lower batch_size, raise loop.accumulate or mesh.fsdp, or set model.remat=True"
UNKNOWN_LENGTH = 10**9  # steps, if the data could not be read
USUAL_SIZE = 224  # of an image


def preflight(
    config: ConfigDict,
    workdir: Path | None,
    *,
    compile_step: bool = True,
    all_images: bool = False,
    processes: Mapping[str, Any] = distributed.SINGLE_PROCESS,
) -> int:
    """Print one line per check and return the exit code. Of several processes each checks for itself.

    Raises:
        ValueError: the processes did not connect, or there is no device.
    """
    with distributed.process_group(**processes, **config.cluster):
        try:
            jax.devices()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"no device can be used ({reason}); stop the process that uses it, or set JAX_PLATFORMS=cpu"
            ) from error
        items = Checklist()
        with contextlib.suppress(ValueError):  # which the data item answers
            config = build.with_num_classes(config)
        valid = items.run("config", _config, config=config)
        task = items.run("model", _model, config=config)
        mesh = items.run("devices", _devices, config=config)
        # Without a model the data are checked at the size that the config gives.
        size = build.input_size(task) if task else (config.model.image_size or USUAL_SIZE,) * 2
        loaders = items.run("data", _data, config=config, size=size)
        items.run("dataset", _dataset, config=config, model=task, data=loaders)
        items.run("batches", _batches, data=loaders)
        items.run("images", _images, config=config, data=loaders, every=all_images)
        epoch = loaders.train.steps_per_epoch if loaders else 1
        optimizer = items.run("optimizer", _optimizer, config=config, epoch=epoch, known=loaders is not None)
        state = items.run("state", _state, config=config, model=task, optimizer=optimizer, devices=mesh)
        if config.init_from:
            items.run("init_from", _init_from, config=config, model=task, data=loaders)
        if teacher.is_used(config):
            task = items.run("teacher", _teacher, config=valid, model=task, devices=mesh)
        if workdir is None:
            items.log("skip", "workdir", "not given with --workdir=DIR")
        else:
            items.run("workdir", _workdir, workdir=workdir)
            items.run("space", _space, config=config, workdir=workdir, state=state)
            items.run("lock", _lock, workdir=workdir)
            total = build.total_steps(config, epoch) if loaders else UNKNOWN_LENGTH
            items.run("checkpoint", _checkpoint, config=config, workdir=workdir, state=state, total=total)
        if compile_step:
            subject = "teacher" if teacher.is_used(config) else "model"
            items.run("step", _step, config=valid, optimizer=optimizer, devices=mesh, state=state, **{subject: task})
        else:
            items.log("skip", "step", "left out by --no_compile")
        summary = f"FAIL: {', '.join(items.failed)}" if items.failed else "all is well"
        print(f"{distributed.name()}{summary}", flush=True)
    return ExitCode.BAD_INPUT if items.failed else ExitCode.DONE


class CheckResult(NamedTuple):
    """Result of a passed check: a line or several, a value that other checks need, and a warning."""

    line: str
    value: Any = True
    warning: str = ""


class Checklist:
    """Runs checks, prints their lines, and remembers the names of those that failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def run(self, name: str, check: Callable[..., CheckResult], **needed: Any) -> Any:
        """Run a check and print its result; return its value, or None if it failed or a needed value is missing."""
        missing = [other for other, value in needed.items() if value is None]
        if missing:
            return self.log("skip", name, f"needs {' and '.join(missing)}")
        try:
            result = check(**needed)
        except Exception as error:  # of any kind, because the other checks are still to be run
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            self.failed.append(name)
            return self.log("FAIL", name, kind + str(error))
        for line in result.line.splitlines():
            self.log("ok", name, line)
        if result.warning:
            self.log("warn", name, result.warning)
        return result.value

    def log(self, verdict: str, name: str, line: str) -> None:
        """Print one line."""
        print(f"{distributed.name()}{verdict:<5} {name:<10}  {line}", flush=True)


def _config(config: ConfigDict) -> CheckResult:
    config_lib.validate(config)
    length = f"{config.total_steps} steps" if config.total_steps else f"{config.num_epochs} epochs"
    return CheckResult(f"batch_size={config.batch_size}, {length}", config)


def _model(config: ConfigDict) -> CheckResult:
    task = tasks.make_task(config)  # not build_task, whose error in another field would hide one of the model
    params, _ = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    size = "x".join(map(str, build.input_size(task)))
    dtype = tasks.compute_dtype(config.compute_dtype)
    return CheckResult(f"{tasks.model_name(config)}, {count(params):,} parameters, images of {size}, {dtype}", task)


def _devices(config: ConfigDict) -> CheckResult:
    mesh = build.build_mesh(config)
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    rows = config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    return CheckResult(f"{distributed.devices()}, mesh {axes}, {rows} examples of a batch on each", mesh)


def _data(config: ConfigDict, size: tuple[int, int]) -> CheckResult:
    if config.batch_size < 1:
        raise ValueError(f"batch_size={config.batch_size} must be at least 1")
    loaders = build.build_loaders(config, size=size)
    epoch = loaders.train.steps_per_epoch
    total = build.total_steps(config, epoch)
    evals = ", ".join(f"{loader.num_examples:,} in {name}" for name, loader in loaders.evals.items())
    counts = f"{loaders.train.num_examples:,} images to train on, {evals}"
    return CheckResult(f"{counts}; {epoch:,} steps an epoch, {total:,} in all ({total / epoch:.1f} epochs)", loaders)


def _dataset(config: ConfigDict, model: Any, data: Any) -> CheckResult:
    model.check_dataset(data.info)
    if config.task.name == "detection":
        from halvit_jax.data.instance_check import check_instances

        lines, warning = check_instances(data, MAX_COUNTED)
        return CheckResult("\n".join(lines), warning=warning)
    if not hasattr(model, "check_records"):
        return CheckResult("fits the task")
    if data.train.num_examples > MAX_COUNTED:
        return CheckResult(f"fits the task; records of more than {MAX_COUNTED:,} images are not read")
    from halvit_jax.data import open_source

    fields = config.data
    source = open_source(fields.name, fields.data_dir, fields.train_split, root=fields.root)
    records = source.shard(0, 1).map(source.fetch).as_numpy_iterator()
    line, warning = model.check_records(records, data.info)
    return CheckResult(line, warning=warning)


def _batches(data: Any) -> CheckResult:
    lines, replaced = [], 0
    for name, loader in {"train": data.train, **data.evals}.items():
        started = time.perf_counter()
        batch = next(loader.batches(0))
        seconds = time.perf_counter() - started
        lines.append(f"{name} {'x'.join(map(str, batch['image'].shape))} in {seconds:.1f} s")
        replaced += int((~batch["mask"]).sum()) if name == "train" else 0  # masked rows of the others only pad
    warning = f"{replaced} images of the first batch cannot be decoded and are replaced" if replaced else ""
    return CheckResult(f"the first were read and decoded: {', '.join(lines)}", warning=warning)


def _images(config: ConfigDict, data: Any, every: bool) -> CheckResult:
    from halvit_jax.data import open_source, undecodable

    if getattr(config, config.task.name, None) is None or config.task.name not in ("classification", "distillation"):
        return CheckResult("only those of the first batches were decoded")
    fields, lines, count = config.data, [], 0
    splits = {fields.train_split: data.train.num_examples, fields.eval_split: data.evals["eval"].num_examples}
    for split, number in splits.items():
        if every or number <= MAX_DECODED:
            name = fields.eval_name if split == fields.eval_split and fields.eval_name else fields.name
            lines += undecodable(open_source(name, fields.data_dir, split, root=fields.root))
            count += number
    if lines:
        listed = "".join(f"\n  {line}" for line in lines)
        message = f"{len(lines)} of {count:,} images cannot be decoded; remove them, or set data.on_bad_image='replace'"
        if fields.on_bad_image == "error":
            raise ValueError(f"{message}:{listed}")
        return CheckResult(
            f"{count:,} were decoded", warning=f"{len(lines)} of them cannot be and are replaced:{listed}"
        )
    rest = "" if count == sum(splits.values()) else f"; --all_images decodes all {sum(splits.values()):,}"
    return CheckResult(f"{count:,} were decoded{rest}")


def _optimizer(config: ConfigDict, epoch: int, known: bool) -> CheckResult:
    make_guard(**config.skip_updates)
    if not known:  # then the length is unknown, and taken to be long
        config = config.copy_and_resolve_references()
        config.total_steps = UNKNOWN_LENGTH
    optimizer = build.build_optimizer(config, steps_per_epoch=epoch)
    return CheckResult(f"{config.optim.name}", optimizer, "; ".join(build.recipe_deviations(config)))


def _state(config: ConfigDict, model: Any, optimizer: Any, devices: Any) -> CheckResult:
    state = build.build_abstract_state(config, model, optimizer, devices)
    return CheckResult(f"{bytes_of(state):,} bytes, and so has a checkpoint", state)


def _init_from(config: ConfigDict, model: Any, data: Any) -> CheckResult:
    found = init_from.read_for_task(config, model)
    warnings = init_from.other_classes(config, model, found, data.info)
    return CheckResult("; ".join(found.lines()), warning="; ".join(warnings).removeprefix("WARNING: "))


def _teacher(config: ConfigDict, model: Any, devices: Any) -> CheckResult:
    del model  # without it there is no student
    setup = teacher.build_distillation(config, devices)
    return CheckResult("; ".join(line.partition(": ")[2] for line in setup.lines()), setup.task)


def _workdir(workdir: Path) -> CheckResult:
    if workdir.exists():
        files.create_workdir(workdir)  # it exists, so this only tests it
        return CheckResult(f"{workdir} can be written to")
    if isinstance(workdir, BucketPath):
        files.create_workdir(workdir)  # which leaves nothing in a bucket
        return CheckResult(f"{workdir} does not exist; the run will create it")
    above = storage.existing(workdir)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "cannot be written to" if above.is_dir() else "is not a folder"
        raise ValueError(f"--workdir={workdir} cannot be created, because {above} {why}; name another one")
    return CheckResult(f"{workdir} does not exist; the run will create it")


def _space(config: ConfigDict, workdir: Path, state: PyTree) -> CheckResult:
    # The newest, the best, and the one being written before an old one is deleted.
    count_kept = config.save.keep + 2
    needed = count_kept * bytes_of(state)
    free, taken = storage.free_bytes(workdir), files.directory_size(workdir / files.CHECKPOINT_FOLDER)
    if free is None:
        return CheckResult(f"{count_kept} checkpoints need {needed:,} bytes; {taken:,} are used by them now")
    line = f"{count_kept} checkpoints need {needed:,} bytes; {free:,} are free, {taken:,} are used by them now"
    if needed > free + taken:
        raise ValueError(f"--workdir={workdir}: {line}; free some, name another one, or lower save.keep")
    return CheckResult(line)


def _lock(workdir: Path) -> CheckResult:
    owner = lock.owner(workdir)
    if owner:
        raise ValueError(f"--workdir={workdir} is in use by {owner}; wait for it, or name another one")
    return CheckResult("free")


def _checkpoint(config: ConfigDict, workdir: Path, state: PyTree, total: int) -> CheckResult:
    from halvit_jax.training.checkpoint.checkpointer import Checkpointer
    from halvit_jax.training.checkpoint.metadata import diff, mismatch_message

    changes = resume.check_changes(workdir, config, allowed=False)
    checkpointer, warnings = Checkpointer(workdir, read_only=True), []
    try:
        for step in reversed(checkpointer.steps()):
            try:
                metadata = checkpointer.metadata(step)
            except CorruptCheckpointError as error:
                warnings.append(f"step {step}: {error}")
                continue
            differences = diff(metadata["arrays"], flatten(state))
            if differences:
                raise ValueError(mismatch_message(step, f"--workdir={workdir}", differences))
            if step >= total:
                warnings.append(f"the run is finished at step {step} of {total} and would only be evaluated")
            return CheckResult(
                f"that of step {step} fits; --workdir alone verifies it", warning="; ".join(changes + warnings)
            )
    finally:
        checkpointer.close()
    if warnings:
        raise ValueError(f"none is good: {'; '.join(warnings)}; start over with --restart_if_corrupt")
    return CheckResult("none yet; the run starts at step 0")


def _step(config: ConfigDict, optimizer: Any, devices: Any, state: PyTree, **subject: Any) -> CheckResult:
    (task,) = subject.values()
    batch = abstract_batch(devices, build.training_spec(config, task), batch_size=config.batch_size)
    step = build.build_train_step(config, task, optimizer)
    started = time.perf_counter()
    try:
        sizes = memory_of(step.lower(state, task.constants, batch).compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"the step does not fit: {str(error).splitlines()[0]}; {MEMORY_HINT}") from error
    seconds = time.perf_counter() - started
    needed = sizes["arguments"] + sizes["temporaries"] + sizes["output"]
    available, where = _available_memory()
    line = (
        f"compiled in {seconds:.1f} s; needs {needed / 2**20:,.1f} MiB on a device, of which "
        f"{sizes['temporaries'] / 2**20:,.1f} MiB only while it runs"
    )
    if available is None:
        return CheckResult(f"{line}; the device does not report its memory")
    line += f"; {available / 2**20:,.1f} MiB are {where}"
    if needed > available:
        raise ValueError(f"{line}; {MEMORY_HINT}")
    return CheckResult(line)


def _available_memory() -> tuple[int | None, str]:
    """Bytes available to a device, and a note; devices of a CPU share the free memory of the machine."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        try:
            lines = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
        except OSError:
            return None, ""
        free = int(lines["MemAvailable"].split()[0]) * 1024
        return free // jax.local_device_count(), "its share of this machine's free memory"
    return (device.memory_stats() or {}).get("bytes_limit"), "available"
