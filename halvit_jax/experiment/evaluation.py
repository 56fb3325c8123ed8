"""Evaluation of weights that were not trained here: `config.init_from` on `config.data`, without a checkpoint."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from halvit_jax.convert.transfer import Transfer
from halvit_jax.experiment import build, init_from, teacher
from halvit_jax.experiment.tasks import build_task
from halvit_jax.protocols import Loader
from halvit_jax.training.sharding import partition
from halvit_jax.training.state import TrainState, with_arrays

PUBLISHED_ON = "imagenet2012"  # the data set of `config.published_top1`


class Evaluation(NamedTuple):
    """The parts of an evaluation, built and checked, before anything is compiled."""

    task: Any  # a Task
    state: TrainState  # without an optimizer
    evals: dict[str, Loader]
    mesh: Mesh
    loaded: Transfer


def without_teacher(config: ConfigDict) -> ConfigDict:
    """The config of the student alone, for an evaluation needs no teacher."""
    if not teacher.is_used(config):
        return config
    config = config.copy_and_resolve_references()
    config.task.name, config.teacher.init_from = "classification", ""
    return config


def build_evaluation(config: ConfigDict) -> Evaluation:
    """The task with the weights of `config.init_from`, and the evaluation sets; no training data, no teacher.

    Raises:
        ValueError: fields that are not allowed, weights that lack arrays of the model, a data set that is not there.
    """
    task, mesh = build_task(config), build.build_mesh(config)
    loaded = init_from.read_for_task(config, task)
    if loaded.initialized:
        raise ValueError(
            f"init_from={config.init_from} lacks arrays that an evaluation needs: {', '.join(loaded.initialized)}; not "
            f"used: {', '.join(loaded.unused) or 'nothing'}; set model.num_classes and init_exclude to fit the weights"
        )
    loaders = build.build_loaders(config, size=build.input_size(task), training=False)
    task.check_dataset(loaders.info)
    return Evaluation(task, _state(task, mesh, loaded), loaders.evals, mesh, loaded)


def published_lines(config: ConfigDict, results: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """The measured top-1 of each result beside `config.published_top1`, and the difference on the same data set."""
    published, lines = config.published_top1, []
    same = (config.data.eval_name or config.data.name) == PUBLISHED_ON
    for name, metrics in results.items() if published else ():
        top1 = 100 * (metrics.get("top1") or 0.0)
        beside = f"({top1 - published:+.2f})" if same and name in ("eval", "ema_eval") else f"on {PUBLISHED_ON}"
        lines.append(f"{name}  top1 {top1:.2f}%, published {published:.2f}% {beside}")
    return lines


def _state(task: Any, mesh: Mesh, loaded: Transfer) -> TrainState:
    """The loaded weights, in the shardings of a run."""
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    shapes = TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state={}, ema={}, grad_spikes={})
    shardings = partition(shapes, task.partition_rules, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return with_arrays(abstract, loaded.arrays).replace(step=shapes.step)
