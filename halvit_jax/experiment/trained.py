"""From a workdir back to a trained model."""

import pathlib
import sys
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from halvit_jax.experiment.tasks import build_task
from halvit_jax.experiment.workdir import read_config, read_dataset_info, workdir_path
from halvit_jax.protocols import DatasetInfo, PyTree, Task
from halvit_jax.training.fault_tolerance.grad_spikes import make_guard
from halvit_jax.training.optim import make_optimizer
from halvit_jax.training.sharding import make_mesh
from halvit_jax.training.state import TrainState, abstract_state


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


def load_trained(workdir: str | pathlib.Path, *, step: int | str | None = None) -> Trained:
    """The newest checkpoint of a run, or that of a step, which may be "best"; to compute in float32.

    Raises:
        ValueError: no run or no checkpoint here, or one that does not fit its own config.
    """
    workdir = workdir_path(workdir)
    config = read_config(workdir)
    config.compute_dtype = "float32"
    task = build_task(config)
    state = restore(task, config, workdir, step=step)
    variables = state.ema or state.trained
    return Trained(task, (variables["params"], variables["model_state"]), config, read_dataset_info(workdir))


def restore(task: Task, config: ConfigDict, workdir: pathlib.Path, *, step: int | str | None = None) -> TrainState:
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
