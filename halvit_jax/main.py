"""Train or evaluate: flags -> config -> devices -> loop; nothing else.

python -m halvit_jax.main --config=configs/halvit_digits.py --workdir=runs/halvit_digits [--mode=train|eval] [--cluster]
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from halvit_jax import config as config_lib
from halvit_jax import distributed
from halvit_jax.cli import app
from halvit_jax.experiment import lock

if TYPE_CHECKING:
    from halvit_jax.experiment.build import Run

DEBUG_FOLDER = "debug"  # of the workdir: what is written where a run ends badly


def define_flags() -> None:
    """The flags of this door."""
    config_flags.DEFINE_config_file("config", None, "File of configs/; override with --config.some.field=value.")
    flags.DEFINE_string("workdir", None, "Where checkpoints, curves and results of the run are kept.")
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train to the end, or evaluate a checkpoint.")
    flags.DEFINE_integer("step", None, "With --mode=eval: the step whose checkpoint to evaluate; else the newest.")
    flags.DEFINE_bool("restart_if_damaged", False, "Begin anew where every checkpoint is damaged.")
    distributed.define_flags()


def main(argv: list[str]) -> None:
    """Work on the parsed flags."""
    values = flags.FLAGS
    with app.bad_input():
        app.no_arguments(argv, "flags look like --config.batch_size=64")
        if values.config is None or values.workdir is None:
            raise ValueError("give both --config=configs/NAME.py and --workdir=DIR")
        if values.step is not None and values.mode != "eval":
            raise ValueError(f"--step={values.step} is for --mode=eval; training goes on from the newest checkpoint")
    work(
        values.config,
        pathlib.Path(values.workdir),
        mode=values.mode,
        step=values.step,
        restart_if_damaged=values.restart_if_damaged,
        processes={name: values[name].value for name in distributed.FLAGS},
    )


def work(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    mode: str = "train",
    step: int | None = None,
    restart_if_damaged: bool = False,
    processes: Mapping[str, Any] = distributed.ALONE,
) -> dict[str, Any]:
    """Train to the end, or evaluate a checkpoint; print the result and return it.

    Bad input ends the program with one line and exit code 2, before anything is compiled; `door` lists the other codes.
    """
    with contextlib.ExitStack() as stack:
        with app.bad_input():
            config_lib.validate(config)
            stack.enter_context(distributed.joined(**processes, folder=workdir, **config.cluster))
            from halvit_jax.experiment import build
            from halvit_jax.experiment import workdir as files

            run = build.build(config, training=mode == "train")
            files.create_workdir(workdir)
            if mode == "train" and distributed.is_first():
                stack.enter_context(lock.held(workdir))
        if mode == "eval":
            return _evaluate(config, workdir, run, step)
        return _train(config, workdir, run, restart_if_damaged=restart_if_damaged)


def _evaluate(config: ConfigDict, workdir: pathlib.Path, run: "Run", step: int | None) -> dict[str, Any]:
    # Orbax and CLU take seconds to import, so what is wrong with the config has been said by now.
    from halvit_jax.training import loop
    from halvit_jax.training.checkpoint.checkpointer import Checkpointer
    from halvit_jax.training.report import Report

    with app.bad_input():
        checkpointer = Checkpointer(workdir, read_only=True)
        restored = checkpointer.restore(run.abstract_state(), step=step)
        if restored is None:
            raise ValueError(f"--workdir={workdir} has no checkpoint to evaluate; train first, with --mode=train")
        report = Report(workdir, total_steps=run.total_steps, batch_size=config.batch_size)
    with app.bad_data(), _attended(config, workdir) as attention:
        result = loop.evaluate_state(
            run.task, restored.state, run.eval_loader, mesh=run.mesh, report=report, **attention
        )
    checkpointer.close()
    report.close()
    report.say(json.dumps(result))
    return result


def _train(config: ConfigDict, workdir: pathlib.Path, run: "Run", *, restart_if_damaged: bool) -> dict[str, Any]:
    from halvit_jax.experiment import build, init_from, teacher
    from halvit_jax.experiment import workdir as files
    from halvit_jax.training import loop
    from halvit_jax.training.checkpoint.checkpointer import Checkpointer
    from halvit_jax.training.report import Report

    with app.bad_input():
        report = Report(workdir, total_steps=run.total_steps, batch_size=config.batch_size)
        checkpointer = Checkpointer(
            workdir,
            **config.save,
            say=report.say,
        )
        beginning = loop.begin(
            checkpointer,
            report,
            run.abstract_state(),
            functools.partial(
                init_from.fresh_state,
                model=run.task.model,
                init=run.fresh_state,
                config=config,
                workdir=workdir,
                say=report.say,
            ),
            eval_every=config.loop.eval_every,
            restart_if_damaged=restart_if_damaged,
        )
        if run.taught:
            teacher.remember(run.taught.record, workdir, resumed=int(beginning.state.step) > 0)
            for line in run.taught.lines():
                report.say(line)
    for line in build.departures(config):
        report.say(f"WARNING: {line}")
    files.write_description(workdir, config, run.class_names)
    report.hyperparameters(config.to_dict())
    with app.bad_data(), app.broken_run(), _attended(config, workdir) as attention:
        result = loop.train(
            run.task,
            run.optimizer,
            beginning,
            run.train_loader,
            run.eval_loader,
            mesh=run.mesh,
            checkpointer=checkpointer,
            report=report,
            debug_folder=workdir / DEBUG_FOLDER,
            seed=config.seed,
            total_steps=run.total_steps,
            limit=run.limit,
            **config.loop,
            **attention,
        )
        checkpointer.close()
    if "stopped" in result:
        report.close()
        app.stopped(f"{result['stopped']}: saved at step {result['step']}; the same command goes on from there")
    files.write_result(workdir, result)
    report.result(result, workdir)
    report.close()
    return result


@contextlib.contextmanager
def _attended(config: ConfigDict, workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Signals are listened to and the watchdog watches, both as keywords for the loop."""
    from halvit_jax.training.fault_tolerance.preemption import Signals
    from halvit_jax.training.fault_tolerance.watchdog import Watchdog

    signals = Signals()
    watchdog = Watchdog(
        workdir / DEBUG_FOLDER, **config.watchdog, name=distributed.name(), explain=distributed.roll_call
    )
    watchdog.start()
    try:
        with signals.listen(), distributed.answering(watchdog.where):
            yield {"signals": signals, "watchdog": watchdog}
    finally:
        watchdog.stop()


if __name__ == "__main__":
    define_flags()
    app.run(main)
