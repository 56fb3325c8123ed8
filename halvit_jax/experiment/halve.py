"""Halving by a config: calibration images of its data, its teacher, its student, and a weight file.

The images are the first of the training split, augmented as the config says; nothing reads their labels. What is done
lies beside the weight file until it is written, so that the same command resumes.
"""

import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from halvit_jax.convert import readers
from halvit_jax.experiment import build
from halvit_jax.experiment.tasks import build_task
from halvit_jax.experiment.teacher import load_teacher
from halvit_jax.experiment.trained import Trained, save_trained
from halvit_jax.halving import checks, fit, vit
from halvit_jax.halving.halve import line
from halvit_jax.tasks.classification import Classification
from halvit_jax.training.evaluate import PreemptedError, evaluate
from halvit_jax.training.fault_tolerance.preemption import PreemptionHandler
from halvit_jax.training.sharding import BATCH
from halvit_jax.trees import count, flatten, sha256, unflatten

MOST_AT_ONCE = 128  # images; their activations, not the tokens of all images, would be the peak of the memory
PROGRESS = ".progress.safetensors"  # behind the name of the weight file


class Job(NamedTuple):
    """All that a halving needs, checked; nothing is computed yet."""

    config: ConfigDict  # of the student
    student: Classification
    teacher: Classification
    params: Any  # the teacher's
    images: int
    settings: vit.Settings
    mesh: Mesh
    loaders: Any


def prepare(config: ConfigDict, *, source: str, images: int, **settings: Any) -> Job:
    """The parts of a halving of the teacher `source` ("": that of the config) into the model of the config.

    Args:
        config: its model, data, batch size, seed, mesh and teacher are used.
        source: a workdir or a weight file.
        images: number of calibration images.
        settings: fields of `vit.Settings`.

    Raises:
        ValueError: what was given, what is allowed and which field or flag to change.
    """
    config = config.copy_and_resolve_references()
    config.teacher.init_from = source or config.teacher.init_from
    if not config.teacher.init_from:
        raise ValueError("--teacher is not given, and teacher.init_from is empty; name a workdir or a weight file")
    config.task.name, config.init_from, config.compute_dtype = "distillation", "", "float32"
    student, mesh = build_task(config), build.build_mesh(config)
    teacher, _ = load_teacher(config, student)
    checks.check_pair(teacher.model, student.model)
    checks.check_images(student.model, images, build.input_size(student))
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = devices * max(min(config.batch_size, MOST_AT_ONCE) // devices, 1)
    given = vit.Settings(**settings, batch=batch, seed=config.seed)
    checks.check_settings(given, devices)
    for field in ("mean", "std"):
        own, known = tuple(config.task[field]), tuple(float(value) for value in getattr(teacher, field))
        if own != known:
            raise ValueError(f"task.{field}={own}, but the teacher has {known}; the copied layers need the teacher's")
    loaders = build.build_loaders(config, size=build.input_size(student))
    student.check_dataset(loaders.info)
    known = Classification(teacher.model, mean=teacher.mean, std=teacher.std)
    return Job(config, student, known, teacher.variables["params"], images, given, mesh, loaders)


def run(job: Job, out: pathlib.Path, *, log: Callable[[str], None]) -> dict[str, Any]:
    """Halve, write the weight file `out`, and return {"top1_before", "top1_after", "params", "sha256", "blocks", ...}.

    The accuracies are those on the config's evaluation set. Asked to stop by a signal, it saves what is done and
    returns {"stopped": the signal's name}.

    Raises:
        ValueError: the progress beside `out` is of another halving.
    """
    progress, preemption = _Progress(out, _key(job)), PreemptionHandler()
    try:
        with preemption.install():
            return _run(job, out, progress, preemption, log)
    except vit.Stopped as stopped:
        progress.save(stopped.unfinished)
    except PreemptedError:
        pass  # between two parts: all that is done is saved
    return {"stopped": preemption.name}


def _run(
    job: Job, out: pathlib.Path, progress: "_Progress", preemption: PreemptionHandler, log: Callable[[str], None]
) -> dict[str, Any]:
    started = time.perf_counter()
    before = _top1(job, job.teacher, job.params, preemption)
    log(f"teacher: {count(job.params):,} parameters, top-1 {before:.2%}")
    for number, block in enumerate(progress.blocks):
        log(line(number, block))
    halved = vit.halved_blocks(
        job.teacher.model,
        job.student.model,
        job.params,
        _images(job),
        job.settings,
        done=len(progress.blocks),
        unfinished=progress.unfinished,
        sharding=NamedSharding(job.mesh, BATCH),
        stop=lambda: bool(preemption.name),
    )
    for block in halved:
        log(line(len(progress.blocks), block))
        progress.add(block)
    params = vit.assembled(job.params, progress.blocks)
    after = _top1(job, job.student, params, preemption)
    save_trained(out, Trained(job.student, (params, {}), job.config, job.loaders.info))
    progress.remove()
    log(f"student: {count(params):,} parameters, top-1 {after:.2%}")
    errors = [{"attention": block.attention._asdict(), "ffn": block.ffn._asdict()} for block in progress.blocks]
    result = {"top1_before": before, "top1_after": after, "params": count(params), "sha256": sha256(params)}
    return result | {"blocks": errors, "seconds": round(time.perf_counter() - started, 1)}


def _images(job: Job) -> Iterator[np.ndarray]:
    """The calibration images, normalised, in batches."""
    left = job.images
    for batch in job.loaders.train.batches(0):
        images = batch["image"][batch["mask"]][:left]
        left -= len(images)
        yield np.asarray(job.student.normalise(jnp.asarray(images)))
        if not left:
            return


def _top1(job: Job, task: Classification, params: Any, preemption: PreemptionHandler) -> float:
    variables = {"params": jax.tree.map(jnp.asarray, params), "model_state": {}}
    return evaluate(task, variables, job.loaders.evals["eval"], job.mesh, preemption=preemption)["top1"]


def _key(job: Job) -> str:
    """What the result is a function of."""
    settings = {**job.settings._asdict(), "images": job.images}
    fields = {name: job.config[name].to_dict() for name in ("model", "data", "task")}
    return json.dumps([sha256(job.params), settings, fields], sort_keys=True)


class _Progress:
    """The finished blocks, and the state of an unfinished fit, in a file beside the result."""

    def __init__(self, out: pathlib.Path, key: str) -> None:
        self._path, self._key = out.with_name(out.name + PROGRESS), key
        self.blocks: list[vit.HalvedBlock] = []
        self.unfinished: vit.Unfinished | None = None
        if self._path.is_file():
            self._read()

    def add(self, block: vit.HalvedBlock) -> None:
        """Keep a finished block."""
        self.blocks.append(block)
        self.save(None)

    def save(self, unfinished: vit.Unfinished | None) -> None:
        """Write the file, unless nothing is done yet."""
        errors = [[block.attention, block.ffn] for block in self.blocks]
        arrays = flatten({f"block{i}": block.params for i, block in enumerate(self.blocks)})
        texts = {"key": self._key, "errors": json.dumps(errors)}
        if unfinished is not None:
            texts["fit"] = json.dumps([unfinished.block, unfinished.fit.step])
            leaves = jax.tree.leaves((unfinished.fit.params, unfinished.fit.moments))
            arrays |= {f"fit/{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
            arrays |= {f"params/{path}": leaf for path, leaf in flatten(unfinished.fit.params).items()}
        if arrays:
            readers.write(self._path, arrays, texts)

    def remove(self) -> None:
        """Delete the file, whose content the result has."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> None:
        arrays, texts = readers.read(self._path)
        if texts.get("key") != self._key:
            raise ValueError(
                f"{self._path} is the progress of another teacher, config or flags; delete it, or name another --out"
            )
        tree = unflatten(arrays)
        for i, errors in enumerate(json.loads(texts["errors"])):
            attention, ffn = (vit.Errors(*pair) for pair in errors)
            self.blocks.append(vit.HalvedBlock(tree[f"block{i}"], attention, ffn))
        if "fit" in texts:
            block, step = json.loads(texts["fit"])
            state = fit.begin(tree["params"], steps=1, learning_rate=1.0)  # for its structure
            leaves = [tree["fit"][str(i)] for i in range(len(tree["fit"]))]
            params, states = jax.tree.unflatten(jax.tree.structure((state.params, state.moments)), leaves)
            self.unfinished = vit.Unfinished(block, fit.FitState(params, states, step))
