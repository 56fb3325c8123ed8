"""Kill a run at random moments or at named ones, start it again, and see that nothing is lost.

python tests/faults/kill.py --data_dir=DIR --trials=300 [--jobs=2]     at uniformly random moments
python tests/faults/kill.py --data_dir=DIR --points                    before, in and after every part of a save

A trial is one kill -9. A run is killed again and again until one start of it survives; then its result must be, bit for
bit, that of a run that was never broken. Runs are forked from a process that has imported everything and touched no
device yet, so that a start costs seconds.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NoReturn

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
STEPS, SAVE_EVERY = 60, 5
KILLED = -signal.SIGKILL


@dataclasses.dataclass
class Record:
    """What the trials have shown."""

    trials: int = 0
    runs: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    most_lost: int = 0  # steps that had to be trained again after a kill
    phases: dict[str, int] = dataclasses.field(default_factory=dict)  # what the run was at when it was killed
    seconds: float = 0.0


def config(data_dir: str, **fields: object) -> "ConfigDict":  # noqa: F821
    """A digits run of 60 small steps with every source of state and randomness on."""
    from halvit_jax.recipes import digits

    made = digits.vit("halvit_tiny")
    values = {
        "total_steps": STEPS,
        "loop.log_every": 1,
        "loop.eval_every": 30,
        "loop.checkpoint_every": SAVE_EVERY,
        "batch_size": 64,
        "recipe_batch_size": 64,
        "model.width": 32,
        "model.depth": 2,
        "model.num_heads": 2,
        "data.data_dir": data_dir,
        "data.virtual_shards": 4,
        "classification.cutmix": 1.0,
        "classification.erase": 0.25,
        "optim.warmup_epochs": 1.0,
        "optim.clip_norm": 1.0,
        "skip_updates.norm_factor": 100.0,
    }
    made.update_from_flattened_dict(values | fields)
    return made


def start(settings: "ConfigDict", workdir: pathlib.Path, log: pathlib.Path, prepare: Callable[[], None]) -> int:  # noqa: F821
    """Fork a process that trains, its output in `log`; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        from halvit_jax.main import run_experiment

        prepare()
        run_experiment(settings, workdir)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """The exit code of a process (negative: its signal), or None where it still runs after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def trial(
    settings: "ConfigDict",  # noqa: F821
    workdir: pathlib.Path,
    *,
    kill_after: float | None,
    record: Record,
    prepare: Callable[[], None] = lambda: None,
) -> int | None:
    """One start of the run in `workdir`, killed after so many seconds, unless it has ended by then.

    What must hold is written into `record.failures` where it does not: after the kill before this start, the run went
    on from at most two save intervals before the last step it had reported, as one save may be under way.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    log = workdir / "log.txt"
    reached = max(_steps(log.read_text() if log.exists() else ""), default=0)
    offset = log.stat().st_size if log.exists() else 0
    pid = start(settings, workdir, log, prepare)
    code = wait(pid, kill_after if kill_after is not None else 600.0)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        text = log.read_bytes()[offset:].decode()
        steps = _steps(text)
        phase = "training" if steps else "compiling" if "resuming" in text else "starting"
        phase = "saving or evaluating" if steps and steps[-1] % SAVE_EVERY == 0 else phase
        record.phases[phase] = record.phases.get(phase, 0) + 1
    text = log.read_bytes()[offset:].decode()
    found = re.search(r"resuming from the checkpoint of step (\d+)", text)
    began = int(found[1]) if found else 0
    if found or _steps(text):  # it came as far as to say where it begins
        lost = max(reached - began, 0)
        record.most_lost = max(record.most_lost, lost)
        if lost > 2 * SAVE_EVERY:
            record.failures.append(f"{workdir.name}: {lost} steps lost")
    wrong = [line for line in text.splitlines() if re.search("^WARNING: |Traceback|^error:", line)]
    record.failures += [f"{workdir.name}: {line}" for line in wrong]
    return code


def _steps(text: str) -> list[int]:
    return [int(step) for step in re.findall(rf"^step (\d+)/{STEPS} ", text, re.MULTILINE)]


def result(workdir: pathlib.Path) -> dict:
    """What a finished run says, without its speed."""
    return {**json.loads((workdir / "result.json").read_text()), "images_per_s": None}


def kill_trials(settings: "ConfigDict", folder: pathlib.Path, *, trials: int, seed: int) -> Record:  # noqa: F821
    """`trials` kills at uniformly random moments of a run's length."""
    record, rng = Record(), random.Random(seed)
    begun = time.monotonic()
    for name in ("whole", "again"):  # the second one does not compile, and so is as long as those that are killed
        began = time.monotonic()
        code = trial(settings, folder / name, kill_after=None, record=record)
        length = time.monotonic() - began
        if code:
            record.failures.append(f"the unbroken run ended with {code}")
            return record
    expected = result(folder / "whole")
    if result(folder / "again") != expected:
        record.failures.append("two unbroken runs differ")
    while record.trials < trials:
        record.runs += 1
        workdir = folder / f"run_{seed}_{record.runs}"
        while True:
            code = trial(settings, workdir, kill_after=rng.uniform(0.0, length), record=record)
            record.trials += code == KILLED
            if code == 0:
                break
            if code != KILLED:
                record.failures.append(f"{workdir.name}: ended with {code}")
                break
        if code == 0 and result(workdir) != expected:
            record.failures.append(f"{workdir.name}: {result(workdir)} is not {expected}")
        left = [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]
        if left:
            record.failures.append(f"{workdir.name}: {left} left behind")
        shutil.rmtree(workdir)
        record.seconds = time.monotonic() - begun
        print(f"{seed}: {record}", flush=True)
    return record


def point_trials(settings: "ConfigDict", folder: pathlib.Path) -> Record:  # noqa: F821
    """One kill at each of POINTS: in the second save of a run or, where old steps are deleted, the first time."""
    record, began = Record(), time.monotonic()
    whole = folder / "whole"
    if trial(settings, whole, kill_after=None, record=record):
        record.failures.append("the unbroken run failed")
        return record
    expected = result(whole)
    for point, prepare in POINTS.items():
        workdir = folder / point.replace(" ", "_")
        code = trial(settings, workdir, kill_after=None, record=record, prepare=prepare)
        if code != KILLED:
            record.failures.append(f"{point}: was not reached (ended with {code})")
            continue
        record.trials += 1
        record.phases[point] = 1
        code = trial(settings, workdir, kill_after=None, record=record)
        if code or result(workdir) != expected:
            record.failures.append(f"{point}: begun again it ended with {code} and another result")
        left = [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]
        if left:
            record.failures.append(f"{point}: {left} left behind")
    record.seconds = time.monotonic() - began
    return record


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _second_time(holder: object, name: str, *, before: bool) -> None:
    """Let the second call of holder.name kill the process, before or after its work."""
    original, calls = getattr(holder, name), []

    def replaced(*arguments: object, **keywords: object) -> object:
        calls.append(name)
        if before and len(calls) == 2:
            _die()
        value = original(*arguments, **keywords)
        if len(calls) == 2:
            _die()
        return value

    setattr(holder, name, replaced)


def _in_write(*, before: bool) -> None:
    import orbax.checkpoint as ocp

    _second_time(ocp.CheckpointManager, "save", before=before)


def _before_commit() -> None:
    from orbax.checkpoint._src.path import atomicity

    for kind in (atomicity.AtomicRenameTemporaryPath, atomicity.CommitFileTemporaryPath):
        original = kind.finalize

        async def killed(self: object, *arguments: object, original: Callable = original, **keywords: object) -> object:
            if "10" in str(self.get_final().name):  # type: ignore[attr-defined]
                _die()
            return await original(self, *arguments, **keywords)

        kind.finalize = killed


def _at_seal(*, before: bool) -> None:
    from halvit_jax.training.checkpoint import manifest

    _second_time(manifest, "write", before=before)


def _at_unseal() -> None:
    from halvit_jax.training.checkpoint import manifest

    original = manifest.unseal

    def replaced(folder: pathlib.Path) -> None:
        original(folder)
        _die()

    manifest.unseal = replaced


def _in_delete() -> None:
    from halvit_jax import storage

    def replaced(folder: pathlib.Path) -> None:
        next(path for path in sorted(folder.rglob("*")) if path.is_file()).unlink()
        _die()

    storage.remove_folder = replaced


POINTS: dict[str, Callable[[], None]] = {
    "before the write": lambda: _in_write(before=True),
    "in the write": lambda: _in_write(before=False),
    "before the commit": _before_commit,
    "between commit and seal": lambda: _at_seal(before=True),
    "after the seal": lambda: _at_seal(before=False),
    "before an old step is deleted": _at_unseal,
    "while an old step is deleted": _in_delete,
}


def warm_up() -> None:
    """Import what a run imports, without touching a device; compiled programs are shared between trials."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    for threads in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(threads, "1")
    import tensorflow_datasets  # noqa: F401

    import halvit_jax.data
    import halvit_jax.experiment.build
    import halvit_jax.training.checkpoint.checkpointer
    import halvit_jax.training.report  # noqa: F401


def main() -> None:
    """Run the trials, in `jobs` processes side by side, and write what they have shown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--points", action="store_true")
    given = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kill_"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    warm_up()
    settings = config(given.data_dir)
    children = {}
    for job in range(given.jobs):
        place = folder / str(job)
        pid = os.fork()
        if not pid:
            if given.points:
                record = point_trials(settings, place)
            else:
                record = kill_trials(settings, place, trials=given.trials // given.jobs, seed=given.seed + job)
            (folder / f"{job}.json").write_text(json.dumps(dataclasses.asdict(record)))
            os._exit(0)
        children[pid] = job
    for pid, job in children.items():
        os.waitpid(pid, 0)
        print((folder / f"{job}.json").read_text(), flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
