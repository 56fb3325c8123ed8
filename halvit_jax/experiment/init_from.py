"""Initial weights from a workdir or a weight file (`config.init_from`)."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from halvit_jax import storage
from halvit_jax.convert import hub, readers
from halvit_jax.convert.transfer import Transfer, below_backbone, read_for, transfer
from halvit_jax.experiment.trained import load_trained
from halvit_jax.experiment.workdir import INIT_FROM_FILE, read_dataset_info, split_source
from halvit_jax.protocols import DatasetInfo, Task
from halvit_jax.storage import Path
from halvit_jax.text import first_few
from halvit_jax.training.state import TrainState, with_arrays
from halvit_jax.trees import TransferRules, flatten

Log = Callable[[str], None]
Init = Callable[[TrainState], TrainState]


def fresh_state(
    abstract: TrainState,
    *,
    task: Task,
    init: Init,
    config: ConfigDict,
    info: DatasetInfo,
    workdir: Path,
    log: Log,
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
        storage.write_text(workdir / INIT_FROM_FILE, json.dumps(content, indent=2) + "\n")
    for line in [*found.lines(), *other_classes(config, task, found, info)]:
        log(f"init_from={config.init_from}: {line}")
    return with_arrays(init(abstract), found.arrays)


def other_classes(config: ConfigDict, task: Task, found: Transfer, info: DatasetInfo) -> list[str]:
    """A warning where a classifier is kept whose classes have other names than those of the data."""
    heads = [pattern for pattern, kind in task.transfer_rules if kind == "head"]
    kept = any(re.search(pattern, path.partition("/")[2]) for pattern in heads for path in found.arrays)
    names = _class_names(split_source(config.init_from)[0])
    if not kept or not names or names == info.class_names:
        return []
    return [
        f"WARNING: its classes are {first_few(names)}, those of the data {first_few(info.class_names)}, and the "
        "classifier is kept; --config.init_exclude=\"('^head',)\" starts it anew"
    ]


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

    `field` of the config names the source; "DIR@best" and "DIR@1200" are checkpoints of a workdir. Of raw weights and
    their averages it takes the averages with `ema`. `positions` is a key of `transfer.RESAMPLINGS`.

    Raises:
        ValueError: the source is neither, or some of its arrays do not fit, each listed by path.
    """
    path, step = split_source(source)
    try:
        local = None if hub.is_source(path) else storage.parse(path)
        if local and local.is_dir():
            arrays = flatten(load_trained(path, step=step, ema=ema).model_variables)
        elif local and not local.exists():
            raise ValueError(f"{local.absolute()} does not exist; train it first, or name another one")
        elif model is None:
            raise ValueError("this task loads weights from a workdir only")
        else:
            arrays = read_for(path, name, model, ema=ema)
        if hasattr(model, "backbone"):
            arrays = below_backbone(arrays)
        return transfer(name, arrays, shapes, rules, exclude=exclude, positions=positions)
    except ValueError as error:
        raise ValueError(f"{field}={source}: {error}") from error


def _class_names(path: str) -> list[str]:
    """The names of the classes that a workdir or an exported file was trained on, if it has them."""
    if not hub.is_source(path) and storage.parse(path).is_dir():
        return read_dataset_info(storage.parse(path)).class_names
    if not path.endswith(".safetensors"):
        return []
    return json.loads(readers.read(path).metadata.get("info", "{}")).get("classes", [])
