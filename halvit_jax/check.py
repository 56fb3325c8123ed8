"""Verify the checkpoints of a run, or dry-run a config.

python -m halvit_jax.check --workdir=DIR [--files_only]                                        verify its checkpoints
python -m halvit_jax.check --config=configs/NAME.py [--workdir=DIR] [--no_compile]             dry-run before training

The first verifies every checkpoint of a workdir, on the CPU, so a run that trains there is not disturbed. The second
checks everything that a run needs before its first step, and trains nothing. Neither changes a workdir, except for the
file that tests whether it can be written to.

Exit codes: 0 all is well; 1 something in the workdir is corrupt; 2 bad input, or a check of the dry run failed.
"""

import sys
from typing import Any

import jax
from absl import flags, logging
from ml_collections import config_flags

from halvit_jax import config as config_lib
from halvit_jax import distributed, storage
from halvit_jax.cli import app
from halvit_jax.cli.preflight import preflight
from halvit_jax.experiment import lock, tasks
from halvit_jax.experiment import workdir as files
from halvit_jax.experiment.trained import abstract_checkpoint_state
from halvit_jax.protocols import ExitCode, PyTree
from halvit_jax.storage import Path
from halvit_jax.training.checkpoint import manifest
from halvit_jax.training.checkpoint.manifest import CorruptCheckpointError

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not committed


def define_flags() -> None:
    """Define the command-line flags."""
    config_flags.DEFINE_config_file("config", None, "File of configs/; override with --config.some.field=value.")
    flags.DEFINE_string("workdir", None, "With --config: the workdir of the future run. Without: the run to verify.")
    flags.DEFINE_bool("files_only", False, "Without --config: compare files only, and restore no arrays.")
    flags.DEFINE_bool("no_compile", False, "With --config: do not compile the training step, which takes longest.")
    flags.DEFINE_bool("all_images", False, "With --config: decode every image, however many there are.")
    flags.DEFINE_bool("smoke", False, "With --config: check the 20 steps that --smoke of halvit_jax.main trains.")
    distributed.define_flags()


def main(argv: list[str]) -> None:
    """Run the checks, print them, and exit with their verdict."""
    values = flags.FLAGS
    logging.set_verbosity(logging.ERROR)  # Orbax warns about read-only access
    with app.report_user_errors():
        app.reject_positional_args(argv, "flags look like --config.batch_size=64")
        if values.config is None and values.workdir is None:
            raise ValueError("give --workdir=DIR to verify its checkpoints, --config=configs/NAME.py to dry-run it")
        wrong = "no_compile" if values.config is None else "files_only"
        if values[wrong].value:
            raise ValueError(f"--{wrong} goes {'with' if values.config is None else 'without'} --config")
        workdir = None if values.workdir is None else storage.parse(values.workdir, "--workdir=")
        if values.config is None:
            jax.config.update("jax_platforms", "cpu")  # an accelerator stays free for a run that may use it
            sys.exit(verify(workdir, files_only=values.files_only))
        processes = {name: values[name].value for name in distributed.FLAGS}
        config = config_lib.smoke(values.config) if values.smoke else values.config
        how = {"compile_step": not values.no_compile, "all_images": values.all_images, "processes": processes}
        sys.exit(preflight(config, workdir, **how))


def verify(workdir: Path, *, files_only: bool = False) -> int:
    """Print a line for the lock, each checkpoint of a workdir in order, and leftovers; return the exit code.

    Files are compared with their manifest; unless `files_only`, arrays are restored, one step after the other, and
    compared with their digests.

    Raises:
        ValueError: this is not the workdir of a run.
    """
    from halvit_jax.training.checkpoint.checkpointer import Checkpointer

    if not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is not a folder; name the workdir of a run")
    folder, file = workdir / files.CHECKPOINT_FOLDER, workdir / files.CONFIG_FILE
    if not folder.is_dir() and not file.is_file():
        raise ValueError(
            f"--workdir={workdir} is not the workdir of a run: it has neither {folder.name} nor {file.name}"
        )
    owner = lock.owner(workdir)
    print(f"lock  {f'held by {owner}' if owner else 'free'}")
    abstract, corrupt, good = None, [], []
    try:
        config = files.read_config(workdir)
        abstract = None if files_only else abstract_checkpoint_state(tasks.build_task(config), config)
    except ValueError as error:
        corrupt.append(file.name)
        print(f"{file.name}  corrupt: {error}" + ("" if files_only else "; so the arrays were not verified"))
    checkpointer = Checkpointer(workdir, read_only=True)
    steps = checkpointer.steps()
    for step in steps:
        is_good, line = _verify_step(checkpointer, folder / str(step), abstract, is_live=bool(owner))
        if is_good is not None:
            (good if is_good else corrupt).append(f"step {step}")
        print(f"step {step}  {line}", flush=True)
    checkpointer.close()
    for path in sorted([*folder.glob(f"*{UNFINISHED}*"), *_uncommitted(folder)]):
        fate = "perhaps in progress" if owner else "the next run removes it"
        print(
            f"leftover  {path.relative_to(workdir)}, {files.directory_size(path):,} bytes: an unfinished save; {fate}"
        )
    for path in sorted((workdir / files.CORRUPT_CHECKPOINT_FOLDER).glob("*")):
        size = f"{files.directory_size(path):,} bytes"
        print(f"leftover  {path.relative_to(workdir)}, {size}: a quarantined corrupt checkpoint; safe to delete")
    unseen = len(files.saved_steps(workdir)) - len(steps)
    counted = f"{len(steps)} checkpoints, {len(good)} good" + (f", {unseen} older not verified" if unseen > 0 else "")
    print(f"{counted}; corrupt: {', '.join(corrupt)}" if corrupt else counted)
    if steps and not good:
        print("no checkpoint is good; start over with --restart_if_corrupt, or in another --workdir")
    elif good:
        print(f"a run would resume from {good[-1]}")
    return ExitCode.PARTLY if corrupt else ExitCode.DONE


def _uncommitted(folder: Path) -> list[Path]:
    """The folders of steps in a bucket that a killed run has left, where Orbax writes into the folder of the step."""
    return [path for path in folder.glob("*") if path.name.isdigit() and not storage.is_committed(path)]


def _verify_step(checkpointer: Any, folder: Path, abstract: PyTree | None, *, is_live: bool) -> tuple[bool | None, str]:
    """(verdict, line): True for a good checkpoint, None for one that the run is deleting."""
    step = int(folder.name)
    sealed, label, reason = manifest.is_sealed(folder), "corrupt", ""
    metadata: dict[str, Any] = {}
    try:
        if abstract is None:
            checkpointer.verify_files(step)
            metadata = checkpointer.metadata(step)
        else:
            metadata = checkpointer.restore(abstract, step=step).metadata
    except CorruptCheckpointError as error:
        reason = str(error).removeprefix(f"the checkpoint of step {step} is corrupt: ")
    except Exception as error:  # of any kind, because the other steps are still to be verified
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        reason, label = f"{kind}{error}", "cannot be restored"
    if reason and is_live and not manifest.is_sealed(folder):
        return None, "is being written or deleted by the run"
    score = "" if metadata.get("score") is None else f", score {metadata['score']:.6g}"
    if sealed or label != "corrupt":
        return not reason, f"{label}: {reason}" if reason else f"good{score}"
    why = "a run may be writing it" if is_live else "the run ended while it was written"
    arrays = f"do not verify: {reason}" if reason else "were not verified" if abstract is None else "verify"
    return not reason, f"not sealed ({why}); its arrays {arrays}{score}"


if __name__ == "__main__":
    define_flags()
    app.run(main)
