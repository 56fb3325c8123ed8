"""A run: from its config to its parts, and back from its workdir.

The one place where a ConfigDict is taken apart; each sub-tree becomes the keywords of one constructor.
"""

import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from halvit_jax import config as config_lib
from halvit_jax.models import create_model
from halvit_jax.protocols import Loader, PyTree
from halvit_jax.tasks.classify import Classification
from halvit_jax.training.health import Limit, make_limit
from halvit_jax.training.optim import Optimizer, make_optimizer
from halvit_jax.training.sharding import check_batch_size, make_mesh
from halvit_jax.training.state import TrainState, abstract_state, init_state

if TYPE_CHECKING:
    from halvit_jax.data.pipeline import Loaders
    from halvit_jax.teacher import Taught

CONFIG_FILE, CLASSES_FILE, RESULT_FILE = "config.json", "classes.json", "result.json"


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
    taught: "Taught | None" = None  # the task again and its teacher, where there is one

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the train state."""
        return abstract_state(self.task, self.optimizer, mesh=self.mesh, use_ema=self.ema_decay > 0, limit=self.limit)

    def fresh_state(self, abstract: TrainState) -> TrainState:
        """The train state that the run begins with."""
        use_ema = self.ema_decay > 0
        return init_state(self.task, self.optimizer, abstract, seed=self.seed, use_ema=use_ema, limit=self.limit)


def build_task(config: ConfigDict) -> Classification:
    """The model of `config.model` under the task of `config.task`, as it is evaluated; a teacher is for training alone.

    Raises:
        ValueError: fields that are not allowed or do not fit each other.
    """
    config_lib.validate(config)
    model = create_model(**config.model, dtype=compute_dtype(config.compute_dtype))
    return Classification(model, **config.task)


def build(config: ConfigDict, *, training: bool = True) -> Run:
    """All parts of a run. Cheap checks come first, so a wrong field is answered before TensorFlow is imported.

    Where it is not for training, a teacher is left out.

    Raises:
        ValueError: what was given, what is allowed and which field of the config to change.
    """
    task = build_task(config)
    mesh = make_mesh(**config.mesh)
    check_batch_size(config.batch_size, mesh, accumulate=config.accumulate)
    limit = make_limit(**config.spikes)

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
    if training and config.task.name == "distill":
        from halvit_jax import teacher

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
        ema_decay=config.ema_decay,
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


def compute_dtype(name: str) -> str:
    """`auto` is bfloat16 on accelerators and float32 on a CPU, where bfloat16 is slow."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def create_workdir(workdir: pathlib.Path) -> None:
    """Make the workdir if it is missing, and try whether it can be written to.

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


def write_description(workdir: pathlib.Path, config: ConfigDict, class_names: list[str]) -> None:
    """What `load_trained` needs beside the checkpoint: the config and the class names, as JSON in the workdir."""
    if jax.process_index():
        return
    (workdir / CONFIG_FILE).write_text(config_lib.to_json(config) + "\n")
    (workdir / CLASSES_FILE).write_text(json.dumps(class_names) + "\n")


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config a workdir was trained with.

    Raises:
        ValueError: there is none, so no run has begun here.
    """
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{workdir} is no workdir of a run: it has no {CONFIG_FILE}")
    return config_lib.from_json(path.read_text())


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
    from halvit_jax.training.checkpoint import Checkpointer

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
    mesh, limit = make_mesh(devices=jax.local_devices()[:1]), make_limit(**config.spikes)
    return abstract_state(task, optimizer, mesh=mesh, use_ema=config.ema_decay > 0, limit=limit)


def write_result(workdir: pathlib.Path, result: dict[str, Any]) -> None:
    """The result of a finished run, as JSON in the workdir; a run that is only evaluated again keeps its speed."""
    if jax.process_index():
        return
    path = workdir / RESULT_FILE
    if result["images_per_s"] is None and path.is_file():
        result = {**result, "images_per_s": json.loads(path.read_text())["images_per_s"]}
    path.write_text(json.dumps(result, indent=2) + "\n")
