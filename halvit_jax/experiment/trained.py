"""From a workdir, or a weight file that knows its run, back to a trained model."""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from halvit_jax import config as config_lib
from halvit_jax import storage
from halvit_jax.convert import engine, readers, weights_file
from halvit_jax.convert.transfer import transfer
from halvit_jax.experiment.tasks import build_task, model_name
from halvit_jax.experiment.workdir import read_config, read_dataset_info
from halvit_jax.protocols import DatasetInfo, PyTree, Task
from halvit_jax.storage import Path
from halvit_jax.training.fault_tolerance.grad_spikes import make_guard
from halvit_jax.training.optim import make_optimizer
from halvit_jax.training.sharding import make_mesh
from halvit_jax.training.state import TrainState, abstract_state
from halvit_jax.trees import flatten, unflatten

CONFIG, DATASET, INFO = "config", "dataset", "info"  # in the metadata of a file; the last is what `export` writes too


class Trained(NamedTuple):
    """A trained model: its task, its variables (the EMA if the run kept one), its config and data set."""

    task: Any  # a Task that is Servable
    variables: tuple[PyTree, PyTree]  # params, model_state
    config: ConfigDict
    info: DatasetInfo

    @property
    def model_variables(self) -> dict[str, PyTree]:
        """The variables as `Servable.serving` takes them."""
        params, model_state = self.variables
        return {"params": params, **model_state}


def load_trained(workdir: str | os.PathLike[str], *, step: int | str | None = None, ema: bool = True) -> Trained:
    """The newest checkpoint of a run, or that of a step, which may be "best"; or the model of a file of `save_trained`.

    It computes in float32. Without `ema` it has the raw weights of a run, even if that has averages.

    Raises:
        ValueError: no run or no checkpoint here, one that does not fit its own config, or a file without a config.
    """
    workdir = storage.parse(workdir)
    if workdir.is_file():
        return _load_file(workdir)
    config = read_config(workdir)
    config.compute_dtype = "float32"
    task = build_task(config)
    state = restore(task, config, workdir, step=step)
    variables = (ema and state.ema) or state.trained
    return Trained(task, (variables["params"], variables["model_state"]), config, read_dataset_info(workdir))


def at_size(trained: Trained, image_size: int) -> Trained:
    """The same model for images of another height and width; learned positions are resampled as in timm.

    Raises:
        ValueError: a task that has sizes of its own, or a size that the model cannot have.
    """
    if trained.config.task.name == "detection":
        raise ValueError(f"image_size={image_size}: a detector takes images of any size, on instances.canvases")
    config = trained.config.copy_and_resolve_references()
    config.model.image_size = image_size
    task = build_task(config)
    variables = fit(task, trained.model_variables, config.model.name)
    return trained._replace(task=task, config=config, variables=(variables.pop("params"), variables))


def fit(task: Task, variables: PyTree, name: str) -> dict[str, PyTree]:
    """The variables of the model `name`, adapted to the size of the images of a task.

    Raises:
        ValueError: arrays that cannot be adapted, by path.
    """
    return unflatten(transfer(name, flatten(variables), _shapes(task), task.transfer_rules, exclude=()).arrays)


def save_trained(path: str | os.PathLike[str], trained: Trained) -> None:
    """Write a weight file that knows its config and data set, so that it serves as a run does.

    Raises:
        ValueError: another suffix than .safetensors.
    """
    fields = {field: value for field, value in trained.config.model.items() if value is not None}
    name, images = fields.pop("name"), {"mean": list(trained.config.task.mean), "std": list(trained.config.task.std)}
    texts = {CONFIG: config_lib.to_json(trained.config), INFO: json.dumps(images)}
    texts[DATASET] = json.dumps(trained.info._asdict() | {"extra": dict(trained.info.extra)})
    if trained.config.task.name == "detection":
        weights_file.save_detector(path, model_name(trained.config), trained.model_variables, metadata=texts)
    else:
        weights_file.save(path, name, trained.model_variables, metadata=texts, **fields)


def _load_file(path: Path) -> Trained:
    weights = readers.read(path)
    if CONFIG not in weights.metadata:
        raise ValueError(
            f"{path} has no config of a run inside; give the workdir of one, or a file of halvit_jax.halve"
        )
    config = config_lib.from_json(weights.metadata[CONFIG])
    config.compute_dtype = "float32"
    stored = None if weights_file.DETECTOR in weights.metadata else weights_file.from_weights(weights)
    if stored is None and weights_file.DETECTOR not in weights.metadata:
        raise ValueError(f"{path} is no file of halvit_jax, although it has a config inside")
    task, info = build_task(config), DatasetInfo(**json.loads(weights.metadata[DATASET]))
    variables = stored.variables if stored else _variables_of(task, model_name(config), weights.arrays)
    params, model_state = variables.pop("params"), variables
    return Trained(task, (params, model_state), config, info)


def _variables_of(task: Task, name: str, arrays: Mapping[str, Any]) -> dict[str, PyTree]:
    """The arrays of a file as the variables of a task, in the shapes of which they must be."""
    engine.check_tree(name, arrays, _shapes(task))
    return unflatten(arrays)


def _shapes(task: Task) -> dict[str, tuple[int, ...]]:
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten({"params": params, **model_state}).items()}


def restore(task: Task, config: ConfigDict, workdir: Path, *, step: int | str | None = None) -> TrainState:
    """The state of the newest checkpoint in `workdir` that verifies, or of a step; whole on this host's first device.

    Raises:
        ValueError: there is no checkpoint, none verifies, or it does not fit.
    """
    from halvit_jax.training.checkpoint.checkpointer import Checkpointer

    abstract = abstract_checkpoint_state(task, config)
    checkpointer = Checkpointer(workdir, read_only=True, log=lambda line: print(line, file=sys.stderr))
    try:
        restored = checkpointer.restore(abstract, step=step)
    finally:
        checkpointer.close()
    if restored is None:
        raise ValueError(f"{workdir} has no checkpoint yet")
    return restored.state


def abstract_checkpoint_state(task: Task, config: ConfigDict) -> TrainState:
    """The state in a checkpoint of this config, to be restored whole to the first device of this host."""
    any_length = {"batch_size": config.batch_size, "steps_per_epoch": 1, "total_steps": 10**9}
    optimizer = make_optimizer(**config.optim, **any_length)
    mesh, guard = make_mesh(devices=jax.local_devices()[:1]), make_guard(**config.skip_updates)
    return abstract_state(task, optimizer, mesh=mesh, use_ema=config.loop.ema_decay > 0, guard=guard)
