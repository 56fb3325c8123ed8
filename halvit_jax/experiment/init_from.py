"""Initial weights from a workdir or a weight file (`config.init_from`)."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from halvit_jax.convert.transfer import Transfer, read_for, transfer
from halvit_jax.experiment.trained import load_trained
from halvit_jax.experiment.workdir import INIT_FROM_FILE
from halvit_jax.protocols import Task
from halvit_jax.training.state import TrainState, with_arrays
from halvit_jax.trees import TransferRules, flatten

Log = Callable[[str], None]
Init = Callable[[TrainState], TrainState]


def fresh_state(
    abstract: TrainState, *, task: Task, init: Init, config: ConfigDict, workdir: pathlib.Path, log: Log
) -> TrainState:
    """The initial train state, in the shardings of `abstract`; logs which weights were loaded.

    Raises:
        ValueError: what `read` refuses.
    """
    if not config.init_from:
        return init(abstract)
    found = read_for_task(config, task)
    if jax.process_index() == 0:
        rest = {"adapted": found.adapted, "initialized": found.initialized, "unused": found.unused}
        content = {"source": config.init_from, "loaded": sorted(found.arrays), **rest}
        (workdir / INIT_FROM_FILE).write_text(json.dumps(content, indent=2) + "\n")
    for line in found.lines():
        log(f"init_from={config.init_from}: {line}")
    return with_arrays(init(abstract), found.arrays)


def read_for_task(config: ConfigDict, task: Task) -> Transfer:
    """The weights of `config.init_from` for a task, by its own transfer rules.

    Raises:
        ValueError: what `read` refuses.
    """
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten({"params": params, **model_state}).items()}
    model, rules = getattr(task, "model", None), task.transfer_rules
    how = {"exclude": config.init_exclude, "ema": config.init_ema, "positions": config.init_positions}
    return read(config.init_from, config.model.name, model, shapes=shapes, rules=rules, **how)


def read(
    source: str,
    name: str,
    model: Any,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    rules: TransferRules,
    exclude: Sequence[str] = (),
    ema: bool = True,
    positions: str = "timm",
    field: str = "init_from",
) -> Transfer:
    """The arrays of a workdir or a weight file that fit the model `name` with variables of these shapes.

    `field` of the config names the source. Of raw weights and their averages it takes the averages with `ema`.
    `positions` is a key of `transfer.RESAMPLINGS`.

    Raises:
        ValueError: the source is neither, or some of its arrays do not fit, each listed by path.
    """
    try:
        if pathlib.Path(source).is_dir():
            arrays = flatten(load_trained(source, ema=ema).model_variables)
        elif model is None:
            raise ValueError("this task loads weights from a workdir only")
        else:
            arrays = read_for(source, name, model, ema=ema)
        return transfer(name, arrays, shapes, rules, exclude=exclude, positions=positions)
    except ValueError as error:
        raise ValueError(f"{field}={source}: {error}") from error
