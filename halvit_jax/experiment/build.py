"""From a config to the parts of a run: the one place where a ConfigDict is taken apart.

Each sub-tree becomes the keywords of one constructor.
"""

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from halvit_jax import storage
from halvit_jax.experiment import teacher
from halvit_jax.experiment.tasks import build_task
from halvit_jax.experiment.teacher import DistillationSetup
from halvit_jax.protocols import Task
from halvit_jax.training import state as state_lib
from halvit_jax.training.fault_tolerance.grad_spikes import GradSpikeGuard, make_guard
from halvit_jax.training.optim import Optimizer, make_optimizer
from halvit_jax.training.sharding import check_batch_size, make_mesh
from halvit_jax.training.state import TrainState
from halvit_jax.training.step import TrainStep, make_train_step

if TYPE_CHECKING:
    from halvit_jax.data.pipeline import Loaders


class Run(NamedTuple):
    """The parts of a run, built and checked, before anything is compiled."""

    config: ConfigDict
    task: Any  # a Task that is Servable
    optimizer: Optimizer
    mesh: Mesh
    loaders: "Loaders"
    total_steps: int
    guard: GradSpikeGuard
    distillation: DistillationSetup | None = None  # the task with its teacher, if there is one

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the train state."""
        return build_abstract_state(self.config, self.task, self.optimizer, self.mesh)

    def fresh_state(self, abstract: TrainState) -> TrainState:
        """The initial train state."""
        return state_lib.init_state(
            self.task,
            self.optimizer,
            abstract,
            seed=self.config.seed,
            use_ema=self.config.loop.ema_decay > 0,
            guard=self.guard,
        )


def build(config: ConfigDict, *, training: bool = True) -> Run:
    """All parts of a run. Cheap checks come first, so a wrong field is reported before TensorFlow is imported.

    The teacher of a distillation is built for training only.

    Raises:
        ValueError: a value that is not allowed; the message names the field, the value and what is allowed.
    """
    if config.compilation_cache:
        cache = storage.parse(config.compilation_cache, "compilation_cache=").absolute()
        jax.config.update("jax_compilation_cache_dir", os.fspath(cache))
    task = build_task(config)
    mesh = build_mesh(config)
    guard = make_guard(**config.skip_updates)
    loaders = build_loaders(config, size=input_size(task))
    task.check_dataset(loaders.info)
    steps_per_epoch = loaders.train.steps_per_epoch
    optimizer = build_optimizer(config, steps_per_epoch=steps_per_epoch)
    setup = teacher.build_distillation(config, mesh) if training and teacher.is_used(config) else None
    return Run(
        config=config,
        task=setup.task if setup else task,
        optimizer=optimizer,
        mesh=mesh,
        loaders=loaders,
        total_steps=total_steps(config, steps_per_epoch),
        guard=guard,
        distillation=setup,
    )


def with_num_classes(config: ConfigDict) -> ConfigDict:
    """The config, a `model.num_classes` of 0 replaced by the number of classes of the training split.

    Raises:
        ValueError: the data set is not there.
    """
    if config.model.num_classes or config.task.name not in ("classification", "distillation"):
        return config
    from halvit_jax import data

    data.hide_accelerators()
    fields = config.data
    source = data.open_source(fields.name, fields.data_dir, fields.train_split, root=fields.root)
    config = config.copy_and_resolve_references()
    config.model.num_classes = len(source.info.class_names)
    return config


def build_mesh(config: ConfigDict, **devices: Any) -> Mesh:
    """The mesh of `config.mesh`, checked against the batch size.

    Raises:
        ValueError: the mesh does not fit the devices, or the batch does not divide over the mesh.
    """
    mesh = make_mesh(**config.mesh, **devices)
    check_batch_size(config.batch_size, mesh, accumulate=config.loop.accumulate)
    return mesh


def input_size(task: Task) -> tuple[int, int]:
    """Height and width of the images that a task reads."""
    return task.batch_spec()["image"].shape[:2]


def training_spec(config: ConfigDict, task: Task) -> dict[str, Any]:
    """`Task.batch_spec` of the training batches, whose images have `data.train_size` pixels if that is set."""
    spec, side = task.batch_spec(), config.data.train_size
    if side:
        image = spec["image"]
        spec["image"] = jax.ShapeDtypeStruct((side, side, *image.shape[2:]), image.dtype)
    return spec


def build_loaders(config: ConfigDict, *, size: tuple[int, int], training: bool = True) -> "Loaders":
    """The loaders of `config.data` for this process, with images of this height and width.

    Those of detection are of `config.instances`, whose canvases are their sizes. Without `training` no training data
    are needed.

    Raises:
        ValueError: a value that is not allowed, or a missing data set, with the command that prepares it.
    """
    from halvit_jax import data

    data.hide_accelerators()
    host = data.Host(jax.process_index(), jax.process_count())
    given = {"batch_size": config.batch_size, "seed": config.seed, "host": host, "training": training}
    if config.task.name == "detection":
        return data.make_detection_loaders(**config.instances, **given)
    channels = config.model.in_channels or 3
    return data.make_loaders(**config.data, size=size, channels=channels, mean=config.task.mean, **given)


def build_optimizer(config: ConfigDict, *, steps_per_epoch: int) -> Optimizer:
    """The optimizer of `config.optim` for a run over this data.

    Raises:
        ValueError: a value that is not allowed, naming its field.
    """
    length = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps(config, steps_per_epoch)}
    return make_optimizer(**config.optim, batch_size=config.batch_size, **length)


def build_abstract_state(config: ConfigDict, task: Task, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the train state of a run."""
    guard = make_guard(**config.skip_updates)
    return state_lib.abstract_state(task, optimizer, mesh=mesh, use_ema=config.loop.ema_decay > 0, guard=guard)


def build_train_step(config: ConfigDict, task: Task, optimizer: Optimizer) -> TrainStep:
    """The jitted training step of a run, as `loop.train` makes it."""
    return make_train_step(
        task,
        optimizer,
        seed=config.seed,
        ema_decay=config.loop.ema_decay,
        accumulate=config.loop.accumulate,
        guard=make_guard(**config.skip_updates),
    )


def total_steps(config: ConfigDict, steps_per_epoch: int) -> int:
    """The length of a run in steps."""
    return config.total_steps or config.num_epochs * steps_per_epoch


def recipe_deviations(config: ConfigDict) -> list[str]:
    """One line for each way in which the config deviates from its recipe, to be logged as a warning."""
    found = []
    if config.task.name == "detection" and config.instances.name == "coco" and not config.init_from:
        frozen = "" if config.detection.train_norms else ", and its BatchNorms, if it has any, never learn statistics"
        found.append(
            f"init_from is not set, so {config.model.name} starts from random weights{frozen}; set init_from to its "
            "ImageNet run or weight file"
        )
    if config.recipe_batch_size in (0, config.batch_size):
        return found
    ratio = f"{config.batch_size}/{config.optim.base_batch_size}"
    effect = {
        "none": "leaves the learning rate as it is",
        "linear": f"multiplies the learning rate by {ratio}",
        "sqrt": f"multiplies the learning rate by sqrt({ratio})",
    }[config.optim.scaling]
    return [
        *found,
        f"batch_size={config.batch_size}, but this recipe was made for {config.recipe_batch_size}; "
        f"optim.scaling={config.optim.scaling!r} {effect}",
    ]
