"""Would this run go well? All that it needs before its first step, item by item; nothing is trained.

The second half of the door `check`: a line for each item, and one that is wrong hides no other that can be looked at
without it.
"""

import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from halvit_jax import config as config_lib
from halvit_jax import distributed
from halvit_jax.analysis.hlo import memory_of
from halvit_jax.cli import app
from halvit_jax.experiment import build, init_from, lock, tasks, teacher
from halvit_jax.experiment import workdir as files
from halvit_jax.models import create_model
from halvit_jax.protocols import PyTree
from halvit_jax.tasks.classification import Classification
from halvit_jax.text import first_few
from halvit_jax.training.checkpoint.manifest import DamagedError
from halvit_jax.training.fault_tolerance.grad_spikes import make_limit
from halvit_jax.training.optim import make_optimizer
from halvit_jax.training.sharding import bytes_of, check_batch_size, make_mesh
from halvit_jax.training.state import abstract_state
from halvit_jax.training.step import abstract_batch, make_train_step
from halvit_jax.trees import count, flatten

COUNTED = 10_000  # images up to which a training split is read once to count its classes
MEND_MEMORY = "lower batch_size, raise loop.accumulate or mesh.fsdp, or set model.remat=True"


def preflight(
    config: ConfigDict,
    workdir: pathlib.Path | None,
    *,
    compile_step: bool = True,
    processes: Mapping[str, Any] = distributed.ALONE,
) -> int:
    """A line for each thing that a run needs; one that is wrong hides no other that can be looked at without it.

    Returns the exit code. Of several processes each looks for itself.

    Raises:
        ValueError: the processes did not come together, or there is no device.
    """
    with distributed.joined(**processes, **config.cluster):
        try:
            jax.devices()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"no device can be used ({reason}); end what uses it, or set JAX_PLATFORMS=cpu") from error
        items = _Items()
        valid = items.check("config", _config, config=config)
        task = items.check("model", _model, config=config)
        mesh = items.check("devices", _devices, config=config)
        # What is not known because something else is wrong is taken to be something usual.
        size = task.model.image_size if task else config.model.image_size or 224
        loaders = items.check("data", _data, config=config, size=size)
        items.check("classes", _classes, config=config, data=loaders)
        items.check("batches", _batches, data=loaders)
        epoch = loaders.train.steps_per_epoch if loaders else 1
        total = build.length(config, epoch) if loaders else 10**9
        optimizer = items.check("optimizer", _optimizer, config=config, epoch=epoch, total=total)
        state = items.check("state", _state, config=config, model=task, optimizer=optimizer, devices=mesh)
        if config.init_from:
            items.check("init_from", _initial, config=config, model=task)
        if config.task.name == "distillation":
            task = items.check("teacher", _teacher, config=valid, model=task, devices=mesh)
        if workdir is None:
            items.say("skip", "workdir", "not given with --workdir=DIR")
        else:
            items.check("workdir", _workdir, workdir=workdir)
            items.check("space", _space, config=config, workdir=workdir, state=state)
            items.check("lock", _lock, workdir=workdir)
            items.check("checkpoint", _checkpoint, workdir=workdir, state=state, total=total)
        if compile_step:
            subject = "teacher" if config.task.name == "distillation" else "model"
            items.check("step", _step, config=valid, optimizer=optimizer, devices=mesh, state=state, **{subject: task})
        else:
            items.say("skip", "step", "left out by --no_compile")
        summary = f"FAIL: {', '.join(items.failed)}" if items.failed else "all is well"
        print(f"{distributed.name()}{summary}", flush=True)
    return app.BAD_INPUT if items.failed else 0


class Finding(NamedTuple):
    """What was found to be well: a line, what others need of it, and what to beware of nevertheless."""

    line: str
    value: Any = True
    warning: str = ""


class _Items:
    """The lines of a preflight, and the names of those that failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def check(self, name: str, look: Callable[..., Finding], **needed: Any) -> Any:
        """`look` at one thing and say what was found; its value, or None where it failed or lacks what it needs."""
        missing = [other for other, value in needed.items() if value is None]
        if missing:
            return self.say("skip", name, f"needs {' and '.join(missing)}")
        try:
            finding = look(**needed)
        except Exception as error:  # whatever it is, the other items are still to be looked at
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            self.failed.append(name)
            return self.say("FAIL", name, kind + str(error))
        self.say("ok", name, finding.line)
        if finding.warning:
            self.say("warn", name, finding.warning)
        return finding.value

    def say(self, verdict: str, name: str, line: str) -> None:
        """One line."""
        print(f"{distributed.name()}{verdict:<5} {name:<10}  {line}", flush=True)


def _config(config: ConfigDict) -> Finding:
    config_lib.validate(config)
    length = f"{config.total_steps} steps" if config.total_steps else f"{config.num_epochs} epochs"
    return Finding(f"batch_size={config.batch_size}, {length}", config)


def _model(config: ConfigDict) -> Finding:
    # Not run.build_task, whose answer to a wrong field elsewhere would hide one of the model.
    dtype = tasks.compute_dtype(config.compute_dtype)
    model = create_model(**config.model, dtype=dtype)
    task = Classification(model, mean=config.task.mean, std=config.task.std, **config.classification)
    params, _ = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    size = task.model.image_size
    return Finding(f"{config.model.name}, {count(params):,} parameters, images of {size}x{size}, {dtype}", task)


def _devices(config: ConfigDict) -> Finding:
    mesh = make_mesh(**config.mesh)
    check_batch_size(config.batch_size, mesh, accumulate=config.loop.accumulate)
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    share = config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    return Finding(f"{distributed.devices()}, mesh {axes}, {share} examples of a batch on each", mesh)


def _data(config: ConfigDict, size: int) -> Finding:
    if config.batch_size < 1:
        raise ValueError(f"batch_size={config.batch_size} must be at least 1")
    loaders = build.build_loaders(config, image_size=size)
    epoch = loaders.train.steps_per_epoch
    total = build.length(config, epoch)
    counts = f"{loaders.train.num_examples:,} images to train on, {loaders.eval.num_examples:,} to evaluate on"
    return Finding(f"{counts}; {epoch:,} steps an epoch, {total:,} in all ({total / epoch:.1f} epochs)", loaders)


def _classes(config: ConfigDict, data: Any) -> Finding:
    names = data.class_names
    build.check_classes(config, names)
    if data.train.num_examples > COUNTED:
        return Finding(f"{len(names)}; not counted in more than {COUNTED:,} images")
    from halvit_jax.data import open_source

    fields = config.data
    source = open_source(fields.name, fields.data_dir, fields.train_split, root=fields.root)
    labels = [int(record["label"]) for record in source.reader(1)(0).map(source.fetch).as_numpy_iterator()]
    counts = np.bincount(labels, minlength=len(names))
    empty = [names[label] for label in np.flatnonzero(counts == 0)]
    split = fields.train_split
    warning = f"{len(empty)} classes of data.train_split={split!r} have no image: {first_few(empty)}" if empty else ""
    return Finding(f"{len(names)}, of {counts.min():,} to {counts.max():,} images", warning=warning)


def _batches(data: Any) -> Finding:
    lines, replaced = [], 0
    for name, loader in (("training", data.train), ("evaluation", data.eval)):
        started = time.perf_counter()
        batch = next(loader.batches(0))
        seconds = time.perf_counter() - started
        lines.append(f"{name} {'x'.join(map(str, batch['image'].shape))} in {seconds:.1f} s")
        replaced += int((~batch["mask"]).sum()) if name == "training" else 0  # the other's only fill up
    warning = f"{replaced} images of the first batch cannot be decoded and are replaced" if replaced else ""
    return Finding(f"the first were read and decoded: {', '.join(lines)}", warning=warning)


def _optimizer(config: ConfigDict, epoch: int, total: int) -> Finding:
    make_limit(**config.skip_updates)
    fields = {"batch_size": config.batch_size, "steps_per_epoch": epoch, "total_steps": total}
    optimizer = make_optimizer(**config.optim, **fields)
    return Finding(f"{config.optim.name}", optimizer, "; ".join(build.departures(config)))


def _state(config: ConfigDict, model: Any, optimizer: Any, devices: Any) -> Finding:
    limit = make_limit(**config.skip_updates)
    state = abstract_state(model, optimizer, mesh=devices, use_ema=config.loop.ema_decay > 0, limit=limit)
    return Finding(f"{bytes_of(state):,} bytes, and so has a checkpoint", state)


def _initial(config: ConfigDict, model: Any) -> Finding:
    found = init_from.read(config.init_from, config.model.name, model.model, fresh=config.init_exclude)
    return Finding("; ".join(found.lines()))


def _teacher(config: ConfigDict, model: Any, devices: Any) -> Finding:
    del model  # without which there is no student
    taught = teacher.taught_task(config, devices)
    return Finding("; ".join(line.partition(": ")[2] for line in taught.lines()), taught.task)


def _workdir(workdir: pathlib.Path) -> Finding:
    if workdir.exists():
        files.create_workdir(workdir)  # which there is, so it is only tried
        return Finding(f"{workdir} can be written to")
    above = _existing(workdir)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "cannot be written to" if above.is_dir() else "is no folder"
        raise ValueError(f"--workdir={workdir} cannot be created, for {above} {why}; name another one")
    return Finding(f"{workdir} is not there; the run will create it")


def _space(config: ConfigDict, workdir: pathlib.Path, state: PyTree) -> Finding:
    from halvit_jax.training.checkpoint.checkpointer import FOLDER

    # The newest, the best, and the one being written before an old one is deleted.
    needed = (config.save.keep + 2) * bytes_of(state)
    free, taken = shutil.disk_usage(_existing(workdir)).free, bytes_in(workdir / FOLDER)
    line = f"{config.save.keep + 2} checkpoints need {needed:,} bytes; {free:,} are free, {taken:,} are theirs now"
    if needed > free + taken:
        raise ValueError(f"--workdir={workdir}: {line}; free some, name another one, or lower save.keep")
    return Finding(line)


def _lock(workdir: pathlib.Path) -> Finding:
    holder = lock.holder(workdir)
    if holder:
        raise ValueError(f"--workdir={workdir} is in use by {holder}; wait for it, or name another one")
    return Finding("free")


def _checkpoint(workdir: pathlib.Path, state: PyTree, total: int) -> Finding:
    from halvit_jax.training.checkpoint.checkpointer import Checkpointer
    from halvit_jax.training.checkpoint.metadata import another_model, compare

    checkpointer, beware = Checkpointer(workdir, read_only=True), []
    try:
        for step in reversed(checkpointer.steps()):
            try:
                facts = checkpointer.facts(step)
            except DamagedError as error:
                beware.append(f"step {step}: {error}")
                continue
            differences = compare(facts["arrays"], flatten(state))
            if differences:
                raise ValueError(another_model(step, f"--workdir={workdir}", differences))
            if step >= total:
                beware.append(f"the run is finished with step {step} of {total} and would only be evaluated")
            return Finding(f"that of step {step} fits; --workdir alone verifies it", warning="; ".join(beware))
    finally:
        checkpointer.close()
    if beware:
        raise ValueError(f"none is good: {'; '.join(beware)}; begin anew with --restart_if_damaged")
    return Finding("none yet; the run begins with step 0")


def _step(config: ConfigDict, optimizer: Any, devices: Any, state: PyTree, **subject: Any) -> Finding:
    (task,) = subject.values()
    batch = abstract_batch(devices, batch_size=config.batch_size, image_size=task.model.image_size)
    settings = {"seed": config.seed, "ema_decay": config.loop.ema_decay, "accumulate": config.loop.accumulate}
    step = make_train_step(task, optimizer, **settings, limit=make_limit(**config.skip_updates))
    started = time.perf_counter()
    try:
        sizes = memory_of(step.lower(state, task.frozen, batch).compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"the step does not fit: {str(error).splitlines()[0]}; {MEND_MEMORY}") from error
    seconds = time.perf_counter() - started
    needed = sizes["arguments"] + sizes["temporaries"] + sizes["output"]
    room, where = _room()
    line = (
        f"compiled in {seconds:.1f} s; needs {needed / 2**20:,.1f} MiB on a device, of which "
        f"{sizes['temporaries'] / 2**20:,.1f} MiB only while it works"
    )
    if room is None:
        return Finding(f"{line}; the device does not say what it has")
    line += f"; {room / 2**20:,.1f} MiB are {where}"
    if needed > room:
        raise ValueError(f"{line}; {MEND_MEMORY}")
    return Finding(line)


def _room() -> tuple[int | None, str]:
    """Bytes that a device may use, and where; devices of a CPU share what is free of the machine's memory."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        try:
            lines = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
        except OSError:
            return None, ""
        free = int(lines["MemAvailable"].split()[0]) * 1024
        return free // jax.local_device_count(), "its part of what is free on this machine"
    return (device.memory_stats() or {}).get("bytes_limit"), "there"


def _existing(path: pathlib.Path) -> pathlib.Path:
    """The path, or the nearest above it that there is."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def bytes_in(folder: pathlib.Path) -> int:
    """Bytes of all files in a folder, of which some may vanish while they are counted."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
