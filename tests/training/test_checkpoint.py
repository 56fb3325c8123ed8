import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.config import default_config
from halvit_jax.training.checkpoint import Checkpointer, compare
from halvit_jax.training.optim import make_optimizer
from halvit_jax.training.paths import flat, sha256
from halvit_jax.training.sharding import make_mesh, to_host
from halvit_jax.training.state import TrainState, abstract_state, init_state

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


class Task:
    """Of a task only what a state needs: two kernels, a scalar, and a model state of two types."""

    partition_rules = (("kernel$", ("fsdp", "tensor")), ("", ()))

    def __init__(self, width: int = 8, layers: int = 2) -> None:
        self.width, self.layers = width, layers

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        keys = jax.random.split(key, self.layers)
        params = {f"layer{i}": {"kernel": jax.random.normal(keys[i], (4, self.width))} for i in range(self.layers)}
        statistics = {"mean": jax.random.normal(key, (3,)).astype(jnp.bfloat16), "count": jnp.array([7], jnp.int32)}
        return params | {"scale": jnp.asarray(1.5)}, {"batch_stats": statistics}


def _abstract(task: Task, sizes: dict[str, int], **optim: Any) -> TrainState:
    fields = default_config().optim.to_dict() | optim
    optimizer = make_optimizer(**fields, batch_size=8, steps_per_epoch=1, total_steps=100)
    return abstract_state(task, optimizer, mesh=make_mesh(**sizes), use_ema=True)


def _state(seed: int = 0, sizes: dict[str, int] = CUBE) -> TrainState:
    optimizer = make_optimizer(**default_config().optim, batch_size=8, steps_per_epoch=1, total_steps=100)
    return init_state(Task(), optimizer, _abstract(Task(), sizes), seed=seed, use_ema=True)


def _save(workdir: pathlib.Path, states: dict[int, TrainState], keep: int = 2) -> None:
    checkpointer = Checkpointer(workdir, keep=keep)
    for step, state in states.items():
        checkpointer.save(step, state)
    checkpointer.close()


def _restore(workdir: pathlib.Path, abstract: TrainState) -> TrainState:
    checkpointer = Checkpointer(workdir)
    try:
        return checkpointer.restore(abstract)
    finally:
        checkpointer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, TrainState]:
    """A workdir with a checkpoint of step 7, and the state in it."""
    workdir = tmp_path_factory.mktemp("saved")
    state = _state()
    _save(workdir, {7: state})
    return workdir, state


@pytest.mark.parametrize("sizes", [CUBE, {"data": 8}, {"data": 1, "fsdp": 4, "tensor": 2}])
def test_a_state_comes_back_bit_for_bit_in_the_shardings_asked_for(
    saved: tuple[pathlib.Path, TrainState], sizes: dict[str, int]
) -> None:
    workdir, state = saved
    abstract = _abstract(Task(), sizes)
    restored = _restore(workdir, abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert sha256(to_host(restored)) == sha256(to_host(state))
    for path, leaf in flat(restored).items():
        wanted = flat(abstract)[path]
        assert (leaf.dtype, leaf.sharding) == (wanted.dtype, wanted.sharding), path


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path: pathlib.Path) -> None:
    state = _state()
    digest = sha256(to_host(state))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    checkpointer.close()
    assert sha256(to_host(_restore(tmp_path, _abstract(Task(), CUBE)))) == digest


def test_the_newest_checkpoints_are_kept_and_the_newest_is_restored(tmp_path: pathlib.Path) -> None:
    states = {step: _state(seed=step) for step in (1, 2, 3)}
    _save(tmp_path, states, keep=2)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == [2, 3]
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.latest_step == 3
    restored = checkpointer.restore(_abstract(Task(), CUBE))
    checkpointer.close()
    assert sha256(to_host(restored)) == sha256(to_host(states[3]))


def test_a_step_that_is_there_is_left_alone(saved: tuple[pathlib.Path, TrainState]) -> None:
    workdir, state = saved
    _save(workdir, {7: _state(seed=1)})
    assert sha256(to_host(_restore(workdir, _abstract(Task(), CUBE)))) == sha256(to_host(state))


def test_without_a_checkpoint_the_folder_is_named(tmp_path: pathlib.Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.latest_step is None
    with pytest.raises(FileNotFoundError, match=re.escape(f"no checkpoint in {tmp_path}/checkpoints")):
        checkpointer.restore(_abstract(Task(), CUBE))
    checkpointer.close()


def test_compare_lists_every_difference_by_path() -> None:
    saved = {
        "a/same": np.zeros((2, 3), np.float32),
        "b/extra": np.zeros(4, np.float32),
        "c/shape": np.zeros((2, 3), np.float32),
        "d/dtype": np.zeros(1, np.float32),
    }
    wanted = {
        "a/same": jax.ShapeDtypeStruct((2, 3), jnp.float32),
        "c/shape": jax.ShapeDtypeStruct((3, 2), jnp.float32),
        "d/dtype": jax.ShapeDtypeStruct((1,), jnp.bfloat16),
        "e/missing": jax.ShapeDtypeStruct((), jnp.int32),
    }
    assert compare(saved, wanted) == [
        "b/extra: float32 (4,) saved, not in this model",
        "c/shape: float32 (2, 3) saved, float32 (3, 2) in this model",
        "d/dtype: float32 (1,) saved, bfloat16 (1,) in this model",
        "e/missing: not saved, int32 () in this model",
    ]
    assert compare(saved, saved) == []


def test_another_models_checkpoint_is_refused_with_all_paths(saved: tuple[pathlib.Path, TrainState]) -> None:
    workdir, _ = saved
    with pytest.raises(ValueError, match="use another --workdir, or the config it was trained with") as error:
        _restore(workdir, _abstract(Task(width=6), CUBE))
    message = str(error.value)
    assert message.startswith(f"the checkpoint of step 7 in {workdir}/checkpoints is of another model or optimizer")
    for holder in ("params", "opt_state/1/mu", "opt_state/1/nu", "ema/params"):
        for layer in ("layer0", "layer1"):
            line = f"  {holder}/{layer}/kernel: float32 (4, 8) saved, float32 (4, 6) in this model"
            assert line in message.splitlines()
    assert "scale" not in message


def test_another_optimizers_checkpoint_is_refused_with_all_paths(saved: tuple[pathlib.Path, TrainState]) -> None:
    with pytest.raises(ValueError, match="is of another model or optimizer") as error:
        _restore(saved[0], _abstract(Task(), CUBE, name="sgd"))
    lines = str(error.value).splitlines()
    assert "  opt_state/1/mu/layer0/kernel: float32 (4, 8) saved, not in this model" in lines
    assert any(line.endswith("not saved, float32 (4, 8) in this model") for line in lines)
    assert not any("  params/" in line for line in lines)


def test_after_forty_differences_the_rest_is_counted(saved: tuple[pathlib.Path, TrainState]) -> None:
    with pytest.raises(ValueError, match="is of another model or optimizer") as error:
        _restore(saved[0], _abstract(Task(layers=14), CUBE))
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 40 + 1
    assert lines[-1] == "  ... and 8 more"
