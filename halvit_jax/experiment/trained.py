"""Back from a workdir to a trained model."""

import json
import pathlib
import sys
from typing import TYPE_CHECKING, NamedTuple

import jax
from ml_collections import ConfigDict

from halvit_jax.protocols import PyTree
from halvit_jax.tasks.classification import Classification
from halvit_jax.training.fault_tolerance.grad_spikes import make_limit
from halvit_jax.training.optim import make_optimizer
from halvit_jax.training.sharding import make_mesh
from halvit_jax.training.state import TrainState, abstract_state

if TYPE_CHECKING:
    pass
from halvit_jax.experiment.tasks import build_task
from halvit_jax.experiment.workdir import CLASSES_FILE, read_config


class Trained(NamedTuple):
    """A trained model: its task, its variables (the averages where the run kept them) and what it was trained for."""

    task: Classification
    variables: tuple[PyTree, PyTree]  # params, model_state
    config: ConfigDict
    class_names: list[str]

    @property
    def model_variables(self) -> dict[str, PyTree]:
        """The variables as `model.apply` takes them."""
        params, model_state = self.variables
        return {"params": params, **model_state}


def load_trained(workdir: str | pathlib.Path) -> Trained:
    """The newest checkpoint of a run, to compute in float32.

    Raises:
        ValueError: no run or no checkpoint here, or one that does not fit its own config.
    """
    workdir = pathlib.Path(workdir)
    config = read_config(workdir)
    config.compute_dtype = "float32"
    task = build_task(config)
    state = restore_newest(task, config, workdir)
    variables = state.ema or state.raw
    class_names = json.loads((workdir / CLASSES_FILE).read_text())
    return Trained(task, (variables["params"], variables["model_state"]), config, class_names)


def restore_newest(task: Classification, config: ConfigDict, workdir: pathlib.Path) -> TrainState:
    """The state of the newest checkpoint in `workdir` that verifies, whole on the first device of this host.

    Raises:
        ValueError: there is no checkpoint, none verifies, or it does not fit.
    """
    from halvit_jax.training.checkpoint.checkpointer import Checkpointer

    abstract = stored_state(task, config)
    checkpointer = Checkpointer(workdir, read_only=True, say=lambda line: print(line, file=sys.stderr))
    try:
        restored = checkpointer.restore(abstract)
    finally:
        checkpointer.close()
    if restored is None:
        raise ValueError(f"{workdir} has no checkpoint yet")
    return restored.state


def stored_state(task: Classification, config: ConfigDict) -> TrainState:
    """What a checkpoint of this config holds, to be restored whole to the first device of this host."""
    any_length = {"batch_size": config.batch_size, "steps_per_epoch": 1, "total_steps": 10**9}
    optimizer = make_optimizer(**config.optim, **any_length)
    mesh, limit = make_mesh(devices=jax.local_devices()[:1]), make_limit(**config.skip_updates)
    return abstract_state(task, optimizer, mesh=mesh, use_ema=config.loop.ema_decay > 0, limit=limit)
