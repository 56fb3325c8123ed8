import os
import pathlib
import random
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.config import default_config
from halvit_jax.training.checkpoint import checkpointer as checkpointer_lib
from halvit_jax.training.checkpoint.checkpointer import CORRUPT_FOLDER, FOLDER, Checkpointer, SaveError, manifest
from halvit_jax.training.checkpoint.manifest import CorruptCheckpointError
from halvit_jax.training.optim import make_optimizer
from halvit_jax.training.sharding import make_mesh, to_host
from halvit_jax.training.state import TrainState, abstract_state, init_state
from halvit_jax.trees import flatten, sha256

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
    checkpointer = Checkpointer(workdir, read_only=True)
    try:
        restored = checkpointer.restore(abstract)
    finally:
        checkpointer.close()
    assert restored is not None
    return restored.state


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, TrainState]:
    """A workdir with a checkpoint of step 7, and the state in it."""
    workdir = tmp_path_factory.mktemp("saved")
    state = _state()
    _save(workdir, {7: state})
    return workdir, state


@pytest.mark.parametrize("sizes", [CUBE, {"data": 8}, {"data": 1, "fsdp": 4, "tensor": 2}])
def test_a_state_is_restored_bit_for_bit_in_the_given_shardings(
    saved: tuple[pathlib.Path, TrainState], sizes: dict[str, int]
) -> None:
    workdir, state = saved
    abstract = _abstract(Task(), sizes)
    restored = _restore(workdir, abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert sha256(to_host(restored)) == sha256(to_host(state))
    for path, leaf in flatten(restored).items():
        wanted = flatten(abstract)[path]
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
    assert sha256(to_host(_restore(tmp_path, _abstract(Task(), CUBE)))) == sha256(to_host(states[3]))


def test_a_step_that_was_restored_is_not_saved_again(saved: tuple[pathlib.Path, TrainState]) -> None:
    workdir, state = saved
    checkpointer = Checkpointer(workdir)
    assert checkpointer.restore(_abstract(Task(), CUBE)).step == 7
    checkpointer.save(7, _state(seed=1))
    checkpointer.close()
    assert sha256(to_host(_restore(workdir, _abstract(Task(), CUBE)))) == sha256(to_host(state))


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path: pathlib.Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.steps() == []
    assert checkpointer.restore(_abstract(Task(), CUBE)) is None
    with pytest.raises(
        ValueError, match=re.escape(f"no checkpoint of step 3 in {tmp_path}/checkpoints, which has none")
    ):
        checkpointer.restore(_abstract(Task(), CUBE), step=3)
    checkpointer.close()


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


def _files(workdir: pathlib.Path, step: int) -> list[pathlib.Path]:
    return sorted(path for path in (workdir / FOLDER / str(step)).rglob("*") if path.is_file())


def _truncate(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def _flip(path: pathlib.Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _delete(path: pathlib.Path, rng: random.Random) -> None:
    path.unlink()


def _swap(path: pathlib.Path, rng: random.Random) -> None:
    """The file of the same name, or of the same place in the list, of the other step."""
    folder = next(parent for parent in path.parents if parent.name == FOLDER)
    step = path.relative_to(folder).parts[0]
    other = next(p for p in folder.iterdir() if p.name.isdigit() and p.name != step)
    counterpart = other / path.relative_to(folder / step)
    ours, theirs = (sorted(p for p in (folder / name).rglob("*") if p.is_file()) for name in (step, other.name))
    counterpart = counterpart if counterpart.exists() else theirs[min(ours.index(path), len(theirs) - 1)]
    path.write_bytes(counterpart.read_bytes())


DAMAGES = {"truncate": _truncate, "empty": _empty, "flip": _flip, "delete": _delete, "swap": _swap}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A workdir with checkpoints of steps 1 and 2 of different states."""
    workdir = tmp_path_factory.mktemp("two")
    _save(workdir, {step: _state(seed=step) for step in (1, 2)})
    return workdir


@pytest.mark.parametrize(
    ("damage", "bytes_each"),
    [
        *((damage, 1) for damage in ("flip", "delete")),
        *(pytest.param(damage, 1, marks=pytest.mark.slow) for damage in ("truncate", "empty", "swap")),
        pytest.param("flip", 10, marks=pytest.mark.slow),
    ],
)
def test_damage_to_any_file_is_found_and_the_step_before_is_taken(
    damage: str, bytes_each: int, two_steps: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Group C3 of the test plan: every file of a step; several bytes of each where a byte is flipped."""
    rng, abstract = random.Random(0), _abstract(Task(), CUBE)
    before = sha256(to_host(_state(seed=1)))
    for number, file in enumerate(_files(two_steps, 2)):
        for trial in range(bytes_each if damage == "flip" else 1):
            workdir = tmp_path / f"{number}_{trial}"
            shutil.copytree(two_steps, workdir)
            path = workdir / file.relative_to(two_steps)
            data = path.read_bytes()
            DAMAGES[damage](path, rng)
            changed = not path.exists() or path.read_bytes() != data
            checkpointer = Checkpointer(workdir, read_only=True)
            restored = checkpointer.restore(abstract)
            if path.name == manifest.NAME and damage == "delete":  # not sealed: its arrays prove it
                assert (restored.step, restored.corrupt) == (2, {})
            elif changed:
                assert restored.step == 1, path
                assert sha256(to_host(restored.state)) == before
                assert str(path) in restored.corrupt[2]
                with pytest.raises(CorruptCheckpointError, match=re.escape(str(path))):
                    checkpointer.restore(abstract, step=2)
            checkpointer.close()
            shutil.rmtree(workdir)


# Orbax leaves the other reads behind when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_unsealed_checkpoint_is_verified_by_its_arrays(two_steps: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A run that ends between commit and seal loses nothing; damage to such a folder never comes back as a state."""
    rng, abstract, outcomes, unreadable = random.Random(0), _abstract(Task(), CUBE), [], []
    states = {step: sha256(to_host(_state(seed=step))) for step in (1, 2)}
    for number, file in enumerate(_files(two_steps, 2)):
        workdir = tmp_path / str(number)
        shutil.copytree(two_steps, workdir)
        manifest.unseal(workdir / FOLDER / "2")
        if file.name != manifest.NAME:
            _flip(workdir / file.relative_to(two_steps), rng)
        checkpointer = Checkpointer(workdir, read_only=True)
        restored = checkpointer.restore(abstract)
        checkpointer.close()
        assert sha256(to_host(restored.state)) == states[restored.step]
        outcomes.append(restored.step)
        if restored.step == 1:
            assert "2 is corrupt" in restored.corrupt[2]
            unreadable.append("2 is corrupt: it was not sealed and cannot be read (" in restored.corrupt[2])
    assert any(unreadable)
    assert set(outcomes) == {1, 2}  # some files hold nothing that is read


def test_a_file_that_process_0_finds_corrupt_is_refused_by_all(
    two_steps: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Checkpointer(two_steps, read_only=True)
    monkeypatch.setattr(reader, "steps", lambda: [1, 2])
    monkeypatch.setattr("jax.process_index", lambda: 1)
    monkeypatch.setattr(checkpointer_lib, "broadcast_from_process_0", lambda verdict: np.array([False, True]))
    with pytest.raises(CorruptCheckpointError, match="step 2 is corrupt: process 0 found a corrupt file"):
        reader.restore(_abstract(Task(), CUBE), step=2)
    monkeypatch.undo()
    reader.close()


def test_the_metadata_of_another_step_are_refused(two_steps: pathlib.Path, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "w"
    shutil.copytree(two_steps, workdir)
    one, two = workdir / FOLDER / "1", workdir / FOLDER / "2"
    manifest.unseal(two)
    (two / "_CHECKPOINT_METADATA").write_bytes((one / "_CHECKPOINT_METADATA").read_bytes())
    checkpointer = Checkpointer(workdir, read_only=True)
    with pytest.raises(CorruptCheckpointError, match="its metadata is of step 1"):
        checkpointer.metadata(2)
    text = (two / "_CHECKPOINT_METADATA").read_text()
    (two / "_CHECKPOINT_METADATA").write_text(text.replace('"evaluated": false', '"evaluated": true'))
    with pytest.raises(
        CorruptCheckpointError, match=r"its metadata has the digest [0-9a-f]{16}, expected [0-9a-f]{16}"
    ):
        checkpointer.metadata(2)
    checkpointer.close()


def test_other_arrays_than_were_saved_are_found_by_their_digests(
    two_steps: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """What Orbax hands back is compared too, not only the files."""
    workdir = tmp_path / "w"
    shutil.copytree(two_steps, workdir)
    one, two = workdir / FOLDER / "1", workdir / FOLDER / "2"
    metadata = (two / "_CHECKPOINT_METADATA").read_bytes()
    shutil.rmtree(two)
    shutil.copytree(one, two)
    (two / "_CHECKPOINT_METADATA").write_bytes(metadata)
    manifest.unseal(two)
    manifest.write(two, 2)
    checkpointer = Checkpointer(workdir, read_only=True)
    with pytest.raises(
        CorruptCheckpointError, match=r"the array \S+ has the digest [0-9a-f]{16}, expected [0-9a-f]{16}"
    ):
        checkpointer.restore(_abstract(Task(), CUBE), step=2)
    checkpointer.close()


def test_where_every_checkpoint_is_damaged_all_are_named(two_steps: pathlib.Path, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "w"
    shutil.copytree(two_steps, workdir)
    for step in (1, 2):
        _flip(_files(workdir, step)[0], random.Random(0))
    checkpointer = Checkpointer(workdir)
    with pytest.raises(CorruptCheckpointError, match=r"step 2 is corrupt: .*; the checkpoint of step 1 is corrupt"):
        checkpointer.restore(_abstract(Task(), CUBE))
    checkpointer.quarantine(checkpointer.steps())
    assert checkpointer.steps() == []
    assert sorted(path.name for path in (workdir / CORRUPT_FOLDER).iterdir()) == ["1", "2"]
    checkpointer.save(2, _state())  # a run that begins anew comes to these steps again
    assert checkpointer.wait()
    checkpointer.quarantine([2])
    assert sorted(path.name for path in (workdir / CORRUPT_FOLDER).iterdir()) == ["1", "2", "2.1"]
    checkpointer.close()


def test_the_best_is_kept_beside_the_newest(tmp_path: pathlib.Path) -> None:
    state, checkpointer = _state(), Checkpointer(tmp_path, keep=1)
    for step, score in {1: 0.5, 2: 0.9, 3: None, 4: 0.9, 5: 0.1, 6: 0.2}.items():
        checkpointer.save(step, state, score=score)
        assert checkpointer.wait()
        kept = {1: [1], 2: [2], 3: [2, 3], 4: [4], 5: [4, 5], 6: [4, 6]}[step]
        assert checkpointer.steps() == kept
    checkpointer.close()


def test_the_newest_is_by_step_not_by_the_clock(tmp_path: pathlib.Path) -> None:
    _save(tmp_path, {1: _state(seed=1), 2: _state(seed=2)})
    for step, when in {1: 2_000_000_000, 2: 1_000_000_000}.items():
        for path in [tmp_path / FOLDER / str(step), *_files(tmp_path, step)]:
            os.utime(path, (when, when))
    assert sha256(to_host(_restore(tmp_path, _abstract(Task(), CUBE)))) == sha256(to_host(_state(seed=2)))


def test_a_failed_save_is_logged_retried_and_given_up(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    checkpointer = Checkpointer(tmp_path, attempts=2, log=logged.append)
    state = _state()
    checkpointer.save(1, state)
    assert checkpointer.wait()
    assert not checkpointer.failed()

    def full(folder: pathlib.Path, step: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        checkpointer.save(2, state)
        assert not checkpointer.wait()
        assert checkpointer.failed()
    assert re.search(
        rf"step 2 could not be written to {tmp_path}.*No space left.*needs [\d,]+ bytes, [\d,]+ are", logged[0]
    )
    checkpointer.save(3, state, again=True)
    assert checkpointer.wait()
    assert not checkpointer.failed()
    monkeypatch.setattr(manifest, "write", full)
    checkpointer.save(4, state)
    assert not checkpointer.wait()
    checkpointer.save(5, state, again=True)
    with pytest.raises(SaveError, match=r"given up after 2 of save\.attempts=2"):
        checkpointer.wait()
    checkpointer.close()
