"""A run: from its config to its parts, and back from its workdir.

The one place where a ConfigDict is taken apart; each sub-tree becomes the keywords of one constructor.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from halvit_jax.experiment import teacher
from halvit_jax.experiment.tasks import build_task
from halvit_jax.experiment.teacher import Taught
from halvit_jax.protocols import Loader
from halvit_jax.tasks.classification import Classification
from halvit_jax.training.fault_tolerance.grad_spikes import Limit, make_limit
from halvit_jax.training.optim import Optimizer, make_optimizer
from halvit_jax.training.sharding import check_batch_size, make_mesh
from halvit_jax.training.state import TrainState, abstract_state, init_state

if TYPE_CHECKING:
    from halvit_jax.data.pipeline import Loaders


class Run(NamedTuple):
    """The parts of a run, built and checked, before anything is compiled."""

    task: Classification
    optimizer: Optimizer
    mesh: Mesh
    train_loader: Loader
    eval_loader: Loader
    class_names: list[str]
    total_steps: int
    limit: Limit
    seed: int
    ema_decay: float
    taught: Taught | None = None  # the task again and its teacher, where there is one

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the train state."""
        return abstract_state(self.task, self.optimizer, mesh=self.mesh, use_ema=self.ema_decay > 0, limit=self.limit)

    def fresh_state(self, abstract: TrainState) -> TrainState:
        """The train state that the run begins with."""
        use_ema = self.ema_decay > 0
        return init_state(self.task, self.optimizer, abstract, seed=self.seed, use_ema=use_ema, limit=self.limit)


def build(config: ConfigDict, *, training: bool = True) -> Run:
    """All parts of a run. Cheap checks come first, so a wrong field is answered before TensorFlow is imported.

    Where it is not for training, a teacher is left out.

    Raises:
        ValueError: what was given, what is allowed and which field of the config to change.
    """
    task = build_task(config)
    mesh = make_mesh(**config.mesh)
    check_batch_size(config.batch_size, mesh, accumulate=config.loop.accumulate)
    limit = make_limit(**config.skip_updates)

    loaders = build_loaders(config, image_size=task.model.image_size)
    check_classes(config, loaders.class_names)
    total_steps = length(config, loaders.train.steps_per_epoch)
    optimizer = make_optimizer(
        **config.optim,
        batch_size=config.batch_size,
        steps_per_epoch=loaders.train.steps_per_epoch,
        total_steps=total_steps,
    )
    taught = None
    if training and config.task.name == "distillation":
        taught = teacher.taught_task(config, mesh)
    return Run(
        task=taught.task if taught else task,
        optimizer=optimizer,
        mesh=mesh,
        train_loader=loaders.train,
        eval_loader=loaders.eval,
        class_names=loaders.class_names,
        total_steps=total_steps,
        limit=limit,
        seed=config.seed,
        ema_decay=config.loop.ema_decay,
        taught=taught,
    )


def build_loaders(config: ConfigDict, *, image_size: int) -> "Loaders":
    """The loaders of `config.data` for this process.

    Raises:
        ValueError: a value that is not allowed, or a data set that is not there, with the command that prepares it.
    """
    from halvit_jax import data

    data.hide_accelerators()
    host = data.Host(jax.process_index(), jax.process_count())
    given = {"batch_size": config.batch_size, "image_size": image_size, "seed": config.seed, "host": host}
    return data.make_loaders(**config.data, **given)


def check_classes(config: ConfigDict, class_names: list[str]) -> None:
    """Refuse a classifier of another size than the data have classes.

    Raises:
        ValueError: with the number to set.
    """
    classes = len(class_names)
    if classes != config.model.num_classes:
        raise ValueError(
            f"model.num_classes={config.model.num_classes}, but data.name={config.data.name!r} has {classes} classes; "
            f"set model.num_classes={classes}"
        )


def length(config: ConfigDict, steps_per_epoch: int) -> int:
    """The steps of a run."""
    return config.total_steps or config.num_epochs * steps_per_epoch


def departures(config: ConfigDict) -> list[str]:
    """One line for each way in which the config leaves its recipe, to be said loudly."""
    if config.recipe_batch_size in (0, config.batch_size):
        return []
    ratio = f"{config.batch_size}/{config.optim.base_batch_size}"
    effect = {
        "none": "leaves the learning rate as it is",
        "linear": f"multiplies the learning rate by {ratio}",
        "sqrt": f"multiplies the learning rate by sqrt({ratio})",
    }[config.optim.scaling]
    return [
        f"batch_size={config.batch_size}, but this recipe was made for {config.recipe_batch_size}; "
        f"optim.scaling={config.optim.scaling!r} {effect}"
    ]
