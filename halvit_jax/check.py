"""Is a run sound, after it or before it?

python -m halvit_jax.check --workdir=DIR [--files_only]                        are the checkpoints what was saved?
python -m halvit_jax.check --config=configs/NAME.py [--workdir=DIR] [--no_compile]        would this run go well?

The first looks at every checkpoint of a workdir, on the CPU, so that a run which is at work there is not disturbed. The
second goes through all that a run needs before its first step, says what is wrong with it, and trains nothing. Neither
changes a workdir, but for the file with which the second tries whether it can be written to.

Exit codes: 0 all is well; 1 something in the workdir is damaged; 2 bad input, or a run that would not go well.
"""

import pathlib
import sys
from typing import Any

import jax
from absl import flags, logging
from ml_collections import config_flags

from halvit_jax import distributed
from halvit_jax.cli import app
from halvit_jax.cli.preflight import bytes_in, preflight
from halvit_jax.experiment import lock, tasks
from halvit_jax.experiment import workdir as files
from halvit_jax.experiment.trained import stored_state
from halvit_jax.protocols import PyTree
from halvit_jax.training.checkpoint import manifest
from halvit_jax.training.checkpoint.manifest import DamagedError

DAMAGED = 1  # exit code
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not committed


def define_flags() -> None:
    """The flags of this door."""
    config_flags.DEFINE_config_file("config", None, "File of configs/; override with --config.some.field=value.")
    flags.DEFINE_string("workdir", None, "With --config: where the run would be kept. Without: the run to look at.")
    flags.DEFINE_bool("files_only", False, "Without --config: compare files alone, and restore no arrays.")
    flags.DEFINE_bool("no_compile", False, "With --config: leave out the training step, whose compiling takes longest.")
    distributed.define_flags()


def main(argv: list[str]) -> None:
    """Look, print, and exit with what was found."""
    values = flags.FLAGS
    logging.set_verbosity(logging.ERROR)  # Orbax warns of reading only
    with app.bad_input():
        app.no_arguments(argv, "flags look like --config.batch_size=64")
        if values.config is None and values.workdir is None:
            raise ValueError("give --workdir=DIR to verify its checkpoints, --config=configs/NAME.py to try a run")
        wrong = "no_compile" if values.config is None else "files_only"
        if values[wrong].value:
            raise ValueError(f"--{wrong} goes {'with' if values.config is None else 'without'} --config")
        workdir = None if values.workdir is None else pathlib.Path(values.workdir)
        if values.config is None:
            jax.config.update("jax_platforms", "cpu")  # an accelerator stays free for the run that may be at work
            sys.exit(verify(workdir, files_only=values.files_only))
        processes = {name: values[name].value for name in distributed.FLAGS}
        sys.exit(preflight(values.config, workdir, compile_step=not values.no_compile, processes=processes))


def verify(workdir: pathlib.Path, *, files_only: bool = False) -> int:
    """A line for each checkpoint of a workdir, in order, for what was left over, and for the lock; returns the code.

    Files are compared with their manifest; unless `files_only`, arrays are restored, one step after the other, and
    compared with their digests.

    Raises:
        ValueError: this is no workdir of a run.
    """
    from halvit_jax.training.checkpoint.checkpointer import DAMAGED_FOLDER, FOLDER, Checkpointer

    if not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is no folder; name the workdir of a run")
    folder, file = workdir / FOLDER, workdir / files.CONFIG_FILE
    if not folder.is_dir() and not file.is_file():
        raise ValueError(f"--workdir={workdir} is no workdir of a run: it has neither {FOLDER} nor {file.name}")
    holder = lock.holder(workdir)
    print(f"lock  {f'held by {holder}' if holder else 'free'}")
    abstract, damaged, good = None, [], []
    try:
        config = files.read_config(workdir)
        abstract = None if files_only else stored_state(tasks.build_task(config), config)
    except ValueError as error:
        damaged.append(file.name)
        print(f"{file.name}  damaged: {error}" + ("" if files_only else "; so the arrays were not verified"))
    checkpointer = Checkpointer(workdir, read_only=True)
    steps = checkpointer.steps()
    for step in steps:
        is_good, line = _verify_step(checkpointer, folder / str(step), abstract, is_live=bool(holder))
        if is_good is not None:
            (good if is_good else damaged).append(f"step {step}")
        print(f"step {step}  {line}", flush=True)
    checkpointer.close()
    for path in sorted(folder.glob(f"*{UNFINISHED}*")):
        fate = "perhaps under way now" if holder else "the next run removes it"
        print(f"leftover  {path.relative_to(workdir)}, {bytes_in(path):,} bytes: an unfinished save; {fate}")
    for path in sorted((workdir / DAMAGED_FOLDER).glob("*")):
        size = f"{bytes_in(path):,} bytes"
        print(f"leftover  {path.relative_to(workdir)}, {size}: a damaged checkpoint set aside; delete it when you like")
    unseen = sum(path.name.isdigit() for path in folder.glob("*")) - len(steps)
    counted = f"{len(steps)} checkpoints, {len(good)} good" + (f", {unseen} older not looked at" if unseen > 0 else "")
    print(f"{counted}; damaged: {', '.join(damaged)}" if damaged else counted)
    if steps and not good:
        print("no checkpoint is good; begin anew with --restart_if_damaged, or in another --workdir")
    elif good:
        print(f"a run would go on from {good[-1]}")
    return DAMAGED if damaged else 0


def _verify_step(
    checkpointer: Any, folder: pathlib.Path, abstract: PyTree | None, *, is_live: bool
) -> tuple[bool | None, str]:
    """Whether a checkpoint is good, and what to say of it; None of one that the run is deleting."""
    step = int(folder.name)
    sealed, label, damage = manifest.is_sealed(folder), "damaged", ""
    facts: dict[str, Any] = {}
    try:
        if abstract is None:
            checkpointer.verify_files(step)
            facts = checkpointer.facts(step)
        else:
            facts = checkpointer.restore(abstract, step=step).facts
    except DamagedError as error:
        damage = str(error).removeprefix(f"the checkpoint of step {step} is damaged: ")
    except Exception as error:  # of whatever kind, the other steps are still to be looked at
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        damage, label = f"{kind}{error}", "cannot be restored"
    if damage and is_live and not manifest.is_sealed(folder):
        return None, "is being written or deleted by the run"
    score = "" if facts.get("score") is None else f", score {facts['score']:.6g}"
    if sealed or label != "damaged":
        return not damage, f"{label}: {damage}" if damage else f"good{score}"
    why = "a run may be writing it" if is_live else "the run ended while it was written"
    arrays = f"do not verify: {damage}" if damage else "were not looked at" if abstract is None else "verify"
    return not damage, f"not sealed ({why}); its arrays {arrays}{score}"


if __name__ == "__main__":
    define_flags()
    app.run(main)
