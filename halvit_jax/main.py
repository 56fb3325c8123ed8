"""Train or evaluate: flags -> config -> devices -> loop.

python -m halvit_jax.main --config=configs/halvit_digits.py --workdir=runs/halvit_digits [--mode=train|eval] [--cluster]
python -m halvit_jax.main ... --profile=100:105        also trace these steps, counted from 0, for TensorBoard
python -m halvit_jax.main --config=configs/shvit.py:s4 --mode=eval --config.init_from=FILE       evaluate these weights

The program from here: experiment/build.py makes the parts of a run from its config (experiment/tasks.py the task,
data/pipeline.py the loaders, training/optim.py the optimizer), experiment/init_from.py its initial weights,
training/loop.py trains (training/step.py is the step), training/evaluate.py evaluates, training/checkpoint/ saves.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from halvit_jax.cli import startup

    startup.exit_on_signals()

import contextlib
import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from halvit_jax import config as config_lib
from halvit_jax import distributed, storage
from halvit_jax.cli import app
from halvit_jax.experiment import lock, resume
from halvit_jax.experiment import workdir as files
from halvit_jax.storage import Path
from halvit_jax.text import one_line

if TYPE_CHECKING:
    from halvit_jax.experiment.build import Run
    from halvit_jax.training.profiling import ProfileRange


def define_flags() -> None:
    """Define the command-line flags."""
    how = "override with --config.some.field=value; docs/configuration.md lists the fields."
    config_flags.DEFINE_config_file("config", None, f"A file of configs/, or the workdir of a run; {how}")
    flags.DEFINE_string("workdir", None, "Folder for checkpoints, curves and results of the run.")
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train to the end, or evaluate a checkpoint.")
    flags.DEFINE_string(
        "step", None, "With --mode=eval: the step whose checkpoint to evaluate, or best; else the newest."
    )
    flags.DEFINE_string("detections", None, "With --mode=eval: a file to write, in the form of COCO's results.")
    flags.DEFINE_bool("restart_if_corrupt", False, "Start over if every checkpoint is corrupt.")
    flags.DEFINE_bool("resume_changed", False, "Resume with fields that change the run, such as the learning rate.")
    flags.DEFINE_string("profile", None, "FIRST:LAST, steps to trace into WORKDIR/profile, counted from 0.")
    flags.DEFINE_bool("smoke", False, "Train 20 steps that touch all that the run will do, anew, in WORKDIR/smoke.")
    flags.DEFINE_string("predictions", None, "With --mode=eval: a CSV file for the prediction on every image.")
    distributed.define_flags()


def main(argv: list[str]) -> None:
    """Train or evaluate as the flags say."""
    values = flags.FLAGS
    profile = None
    with app.report_user_errors():
        app.reject_positional_args(argv, "flags look like --config.batch_size=64")
        weights_only = values.mode == "eval" and values.config is not None and values.config.init_from
        if values.config is None or (values.workdir is None and not weights_only):
            raise ValueError(
                "give both --config=configs/NAME.py and --workdir=DIR; only --mode=eval of the weights in "
                "--config.init_from=FILE needs no workdir"
            )
        if values.step is not None and (values.mode != "eval" or values.workdir is None):
            raise ValueError(
                f"--step={values.step} is for --mode=eval with a --workdir; training resumes from the newest checkpoint"
            )
        if values.detections is not None:
            if values.mode != "eval" or values.workdir is None or values.config.task.name != "detection":
                raise ValueError(
                    f"--detections={values.detections} is for --mode=eval of task.name='detection' with a --workdir"
                )
            if not pathlib.Path(values.detections).absolute().parent.is_dir():
                raise ValueError(f"--detections={values.detections} is in a folder that does not exist; create it")
        if values.profile is not None:
            from halvit_jax.training.profiling import parse_range

            profile = parse_range(values.profile)
            if values.mode != "train":
                raise ValueError(f"--profile={values.profile} is for --mode=train")
        if values.predictions is not None and (values.mode != "eval" or values.workdir is None):
            raise ValueError(f"--predictions={values.predictions} is for --mode=eval with a --workdir")
        step = files.parse_step(values.step)
    processes = {name: values[name].value for name in distributed.FLAGS}
    config = config_lib.smoke(values.config) if values.smoke else values.config
    if values.workdir is None:
        evaluate_weights(config, processes=processes)
        return
    with app.report_user_errors():
        workdir = storage.parse(values.workdir, "--workdir=")
        if values.smoke:
            workdir = workdir / files.SMOKE_FOLDER
            storage.remove_folder(workdir, ignore_errors=True)
    run_experiment(
        config,
        workdir,
        mode=values.mode,
        step=step,
        detections=values.detections,
        restart_if_corrupt=values.restart_if_corrupt,
        resume_changed=values.resume_changed,
        profile=profile,
        predictions=values.predictions,
        processes=processes,
    )


def run_experiment(
    config: ConfigDict,
    workdir: Path,
    *,
    mode: str = "train",
    step: int | str | None = None,
    detections: str | None = None,
    restart_if_corrupt: bool = False,
    resume_changed: bool = False,
    profile: "ProfileRange | None" = None,
    predictions: str | None = None,
    processes: Mapping[str, Any] = distributed.SINGLE_PROCESS,
) -> dict[str, Any]:
    """Train to the end, or evaluate a checkpoint; print the result and return it.

    An evaluation of detection writes those of the EMA, if there is one, to the file `detections`.

    Bad input ends the program with one line and exit code 2, before anything is compiled.
    """
    with contextlib.ExitStack() as stack:
        with app.report_user_errors():
            config_lib.validate(config)
            stack.enter_context(distributed.process_group(**processes, folder=workdir, **config.cluster))
            from halvit_jax.experiment import build

            config = build.with_num_classes(config)
            if distributed.is_first() and sys.stdout.isatty():
                print(f"opening the data and building {config.model.name}", flush=True)
            run = build.build(config, training=mode == "train")
            if profile and profile.last >= run.total_steps:
                raise ValueError(f"--profile={profile.first}:{profile.last} must end below {run.total_steps} steps")
            if mode == "eval" and not files.saved_steps(workdir):  # a folder would be made for a typing error
                raise ValueError(
                    f"--workdir={workdir} has no checkpoint to evaluate; train first, with --mode=train"
                    + ("; or leave out --workdir to evaluate the weights of init_from" if config.init_from else "")
                )
            files.create_workdir(workdir)
            if mode == "train" and distributed.is_first():
                stack.enter_context(lock.acquire(workdir))
            changes = resume.check_changes(workdir, config, allowed=resume_changed) if mode == "train" else []
        if mode == "eval":
            return _evaluate(config, workdir, run, step, predictions, detections)
        return _train(config, workdir, run, changes, restart_if_corrupt=restart_if_corrupt, profile=profile)


def evaluate_weights(
    config: ConfigDict, *, processes: Mapping[str, Any] = distributed.SINGLE_PROCESS
) -> dict[str, Any]:
    """Evaluate the weights of `config.init_from`, print the result beside the published one, and return it.

    Bad input ends the program with one line and exit code 2, before anything is compiled.
    """
    with contextlib.ExitStack() as stack:
        with app.report_user_errors():
            from halvit_jax.experiment import evaluation

            config = evaluation.without_teacher(config)
            config_lib.validate(config)
            stack.enter_context(distributed.process_group(**processes, folder=None, **config.cluster))
            from halvit_jax.training import loop
            from halvit_jax.training.report import Report

            parts = evaluation.build_evaluation(config)
        # For the curves, which nobody reads, and the stacks of a stalled run, which are printed too.
        workdir = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = {"progress": parts.task.progress_metrics, "units": parts.task.units}
        report = Report(workdir, total_steps=0, batch_size=config.batch_size, **names)
        for line in parts.loaded.lines():
            report.log(f"init_from={config.init_from}: {line}")
        with app.report_data_errors(), _fault_handlers(config, workdir) as handlers:
            result = loop.evaluate_state(
                parts.task, parts.state, parts.evals, mesh=parts.mesh, report=report, **handlers
            )
        _log_evaluation(config, report, result)
    return result


def _log_evaluation(config: ConfigDict, report: Any, result: dict[str, Any], lines: Sequence[str] = ()) -> None:
    from halvit_jax.experiment import evaluation

    for line in [*lines, *evaluation.published_lines(config, result)]:
        report.log(line)
    report.close()
    report.log(json.dumps(result))


def _evaluate(
    config: ConfigDict,
    workdir: Path,
    run: "Run",
    step: int | str | None,
    predictions: str | None,
    detections: str | None,
) -> dict[str, Any]:
    # Orbax and CLU take seconds to import, so an error in the config is reported before.
    from halvit_jax.training import loop
    from halvit_jax.training.checkpoint.checkpointer import Checkpointer

    with app.report_user_errors():
        checkpointer = Checkpointer(workdir, read_only=True)
        with _name_changes(workdir, config):
            restored = checkpointer.restore(run.abstract_state(), step=step)
        report = _make_report(config, workdir, run, curves=False)
    collectors: dict[str, Any] = {}
    with app.report_data_errors(), _fault_handlers(config, workdir) as handlers:
        result = loop.evaluate_state(
            run.task,
            restored.state,
            run.loaders.evals,
            mesh=run.mesh,
            report=report,
            collected=collectors.__setitem__,
            **handlers,
        )
    if detections is not None and distributed.is_first():
        found = loop.primary(collectors).detections
        pathlib.Path(detections).write_text(json.dumps(found) + "\n")
        report.log(f"{detections}: {len(found):,} detections")
    checkpointer.close()
    data = {name: config.data[name] for name in ("eval_name", "eval_split")}
    files.append_evaluation(workdir, {"step": restored.step, **data, **result})
    lines = []
    if predictions:
        from halvit_jax.experiment.predictions import write_predictions

        values = restored.state.ema or restored.state.trained
        variables = {"params": values["params"], **values["model_state"]}
        with app.report_user_errors():
            file = pathlib.Path(predictions).expanduser()
            lines = write_predictions(file, run.task, variables, run.loaders.evals["eval"], run.loaders.info)
    _log_evaluation(config, report, result, lines)
    return result


def _train(
    config: ConfigDict,
    workdir: Path,
    run: "Run",
    changes: list[str],
    *,
    restart_if_corrupt: bool,
    profile: "ProfileRange | None",
) -> dict[str, Any]:
    from halvit_jax.experiment import build, init_from, teacher
    from halvit_jax.training import loop
    from halvit_jax.training.checkpoint.checkpointer import Checkpointer
    from halvit_jax.training.optim import frozen_line
    from halvit_jax.training.profiling import Profiler

    with app.report_user_errors():
        report = _make_report(config, workdir, run)
        checkpointer = Checkpointer(workdir, **config.save, log=report.log)
        with _name_changes(workdir, config):
            start = loop.restore_or_init(
                checkpointer,
                report,
                run.abstract_state(),
                functools.partial(
                    init_from.fresh_state,
                    task=run.task,
                    init=run.fresh_state,
                    config=config,
                    info=run.loaders.info,
                    workdir=workdir,
                    log=report.log,
                ),
                eval_every=config.loop.eval_every,
                restart_if_corrupt=restart_if_corrupt,
            )
        resumed_at = int(start.state.step)
        if run.distillation:
            teacher.pin_teacher(run.distillation.record, workdir, resumed=resumed_at > 0)
            for line in run.distillation.lines():
                report.log(line)
    for line in [*(changes if resumed_at else []), *build.recipe_deviations(config)]:
        report.log(f"WARNING: {line}")
    files.write_run_metadata(workdir, config, run.loaders.info, resumed_at=resumed_at)
    if changes and resumed_at < run.total_steps:
        files.set_aside_result(workdir, resumed_at=resumed_at)
    if config.optim.frozen:
        report.log(frozen_line(start.state.params, config.optim.frozen))
    report.hyperparameters(config.to_dict())
    profiler = Profiler(workdir / files.PROFILE_FOLDER, profile)
    with app.report_data_errors(), app.report_fatal_run(), _fault_handlers(config, workdir) as handlers:
        result = loop.train(
            run.task,
            run.optimizer,
            start,
            run.loaders.train,
            run.loaders.evals,
            mesh=run.mesh,
            checkpointer=checkpointer,
            report=report,
            debug_folder=workdir / files.DEBUG_FOLDER,
            seed=config.seed,
            total_steps=run.total_steps,
            **config.loop,
            guard=run.guard,
            profiler=profiler,
            **handlers,
        )
        checkpointer.close()
    if "stopped" in result:
        report.close()
        app.stopped(f"{result['stopped']}: saved at step {result['step']}; the same command resumes from there")
    with app.report_fatal_run():
        files.write_result(workdir, result)
    report.result(result, workdir)
    report.close()  # the page reads the curves
    if distributed.is_first():
        report.log(_write_page(config, workdir, run, result))
    return result


def _write_page(config: ConfigDict, workdir: Path, run: "Run", result: dict[str, Any]) -> str:
    """Write report.html and return a line for people; a run without it is as good."""
    from halvit_jax.experiment import page

    info, loader = run.loaders.info, run.loaders.evals["eval"]
    try:
        path = page.write_page(workdir, config=config, info=info, loader=loader, result=result)
    except (OSError, ValueError, KeyError) as error:
        return f"WARNING: {files.PAGE_FILE} is not written: {one_line(error)}"
    return f"  {'on one page':<18}{path}"


@contextlib.contextmanager
def _name_changes(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Answer a checkpoint of another model with the fields that differ, in place of its arrays."""
    from halvit_jax.training.checkpoint.metadata import MismatchError

    try:
        yield
    except MismatchError as error:
        changed = resume.that_change_the_run(resume.changed_fields(workdir, config))
        if not changed:
            raise
        raise ValueError(
            f"{str(error).splitlines()[0].partition(';')[0]}: it was trained with {resume.describe(changed)}; give the "
            "old values, or another --workdir"
        ) from error


def _make_report(config: ConfigDict, workdir: Path, run: "Run", *, curves: bool = True) -> Any:
    from halvit_jax.training.report import Report

    return Report(
        workdir,
        total_steps=run.total_steps,
        batch_size=config.batch_size,
        progress=run.task.progress_metrics,
        units=run.task.units,
        curves=curves,
    )


@contextlib.contextmanager
def _fault_handlers(config: ConfigDict, workdir: Path) -> Iterator[dict[str, Any]]:
    """The preemption handler and the watchdog, both active, as keyword arguments of `loop.train`."""
    from halvit_jax.training.fault_tolerance.preemption import PreemptionHandler
    from halvit_jax.training.fault_tolerance.watchdog import Watchdog

    preemption = PreemptionHandler()
    watchdog = Watchdog(
        workdir / files.DEBUG_FOLDER,
        **config.watchdog,
        name=distributed.name(),
        diagnose_peers=distributed.collect_status,
    )
    watchdog.start()
    try:
        with preemption.install(), distributed.status_responder(watchdog.status):
            yield {"preemption": preemption, "watchdog": watchdog}
    finally:
        watchdog.stop()


if __name__ == "__main__":
    define_flags()
    app.run(main)
