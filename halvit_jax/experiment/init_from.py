"""What a run begins with where it does not begin with nothing: `config.init_from`."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from halvit_jax.convert import shapes_of
from halvit_jax.convert.transfer import Transfer, read_for, transfer
from halvit_jax.experiment.trained import load_trained
from halvit_jax.models import transfer_rules
from halvit_jax.training.state import TrainState, with_arrays
from halvit_jax.trees import flatten

FILE = "init_from.json"  # of the workdir: every path and what became of it
Say = Callable[[str], None]
Init = Callable[[TrainState], TrainState]


def fresh_state(
    abstract: TrainState, *, model: Any, init: Init, config: ConfigDict, workdir: pathlib.Path, say: Say
) -> TrainState:
    """The train state that a run begins with, in the shardings of `abstract`; it says what it has taken over.

    Raises:
        ValueError: what `read` refuses.
    """
    if not config.init_from:
        return init(abstract)
    found = read(config.init_from, config.model.name, model, fresh=config.init_exclude)
    if jax.process_index() == 0:
        rest = {"changed": found.changed, "fresh": found.fresh, "unused": found.unused}
        content = {"source": config.init_from, "loaded": sorted(found.arrays), **rest}
        (workdir / FILE).write_text(json.dumps(content, indent=2) + "\n")
    for line in found.lines():
        say(f"init_from={config.init_from}: {line}")
    return with_arrays(init(abstract), found.arrays)


def read(source: str, name: str, model: Any, *, fresh: Sequence[str], field: str = "init_from") -> Transfer:
    """What the model `name` can begin with of a workdir or a weight file, both being left as they are.

    `field` of the config names the source.

    Raises:
        ValueError: it is neither, or holds what the model cannot begin with, all of it by path.
    """
    try:
        if pathlib.Path(source).is_dir():
            arrays = flatten(load_trained(source).model_variables)
        else:
            arrays = read_for(source, name, model)
        return transfer(name, arrays, shapes_of(model), transfer_rules(model), fresh=fresh)
    except ValueError as error:
        raise ValueError(f"{field}={source}: {error}") from error
