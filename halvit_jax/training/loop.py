"""The training loop.

restore or initialise -> for each step: batch, train step, check the step before, report, evaluate, save -> the result.
"""

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from halvit_jax.protocols import Array, Collector, DataError, Loader, PyTree, Task
from halvit_jax.storage import Path
from halvit_jax.training.checkpoint.checkpointer import Checkpointer
from halvit_jax.training.checkpoint.manifest import CorruptCheckpointError
from halvit_jax.training.evaluate import Metrics, PreemptedError, evaluate
from halvit_jax.training.fault_tolerance import grad_spikes, nonfinite
from halvit_jax.training.fault_tolerance.preemption import SAVE_AGAIN, STOP, PreemptionHandler
from halvit_jax.training.fault_tolerance.watchdog import COMPILING, TRAINING, Watchdog
from halvit_jax.training.optim import Optimizer
from halvit_jax.training.profiling import Profiler
from halvit_jax.training.report import Report
from halvit_jax.training.sharding import to_devices, to_host
from halvit_jax.training.state import TrainState
from halvit_jax.training.step import StepReport, add_state_flags, make_train_step
from halvit_jax.trees import count, sha256

CHECK_STATE_EVERY = 8  # steps between checks of the whole state
UNEVALUATED: dict[str, Any] = {"evaluated": False, "score": None}  # saved with a step beside its state
PRIMARY = "eval"  # key of the evaluation set that chooses the best checkpoint
EMA = "ema_"  # prefix of an evaluation of the EMA


class Start(NamedTuple):
    """The state to start from, whether the evaluation of its step is still due, and what early stopping remembers."""

    state: TrainState
    evaluation_due: bool = False
    best: float | None = None  # score of all evaluations up to here
    stale: int = 0  # evaluations since then


def restore_or_init(
    checkpointer: Checkpointer,
    report: Report,
    abstract: TrainState,
    fresh_state: Callable[[TrainState], TrainState],
    *,
    eval_every: int,
    restart_if_corrupt: bool = False,
) -> Start:
    """The state of the newest checkpoint that verifies, else a fresh one; either way in the shardings of `abstract`.

    Corrupt checkpoints that are newer are logged and moved to `corrupt/`.

    Raises:
        CorruptCheckpointError: there are checkpoints, and none verifies; `restart_if_corrupt` starts over instead.
        ValueError: the checkpoint belongs to another model or optimizer.
    """
    try:
        restored = checkpointer.restore(abstract)
    except CorruptCheckpointError as error:
        if not restart_if_corrupt:
            raise CorruptCheckpointError(
                f"no checkpoint is good: {error}; start over with --restart_if_corrupt"
            ) from error
        report.log(f"WARNING: {error}; starting over")
        checkpointer.quarantine(checkpointer.steps())
        restored = None
    if restored is None:
        return Start(fresh_state(abstract))
    checkpointer.quarantine(list(restored.corrupt))
    report.log(f"resuming from the checkpoint of step {restored.step}")
    metadata = restored.metadata
    due = restored.step % eval_every == 0 and not metadata["evaluated"]
    return Start(restored.state, due, metadata.get("best"), metadata.get("stale", 0))


def train(
    task: Task,
    optimizer: Optimizer,
    start: Start,
    train_loader: Loader,
    evals: Mapping[str, Loader],
    *,
    mesh: Mesh,
    checkpointer: Checkpointer,
    report: Report,
    preemption: PreemptionHandler,
    watchdog: Watchdog,
    debug_folder: Path,
    seed: int,
    total_steps: int,
    log_every: int,
    eval_every: int,
    checkpoint_every: int,
    ema_decay: float,
    early_stopping: int = 0,
    accumulate: int = 1,
    guard: grad_spikes.GradSpikeGuard = grad_spikes.OFF,
    profiler: Profiler | None = None,
) -> dict[str, Any]:
    """Train to `total_steps` and return the run's result; or, asked to stop, save and return {"step", "stopped"}.

    A run that is stopped or killed at any time and resumed ends with the same parameters, bit for bit. `evals` are
    evaluated side by side; the one called "eval" chooses the best checkpoint.

    Raises:
        NotFiniteError, SpikesError: at most two steps late if the loss, a gradient or a statistic is not finite, at
            most ten if only another part of the state is not; the last batches are in `debug_folder`, the state is not
            saved.
        SaveError: a checkpoint could not be written.
    """
    state, evaluation_due, best, stale = start
    profiler = profiler or Profiler(debug_folder)
    step = first = int(state.step)
    report.parameters(state.params)
    results: dict[str, Metrics] = {}
    stop = False
    evaluating: dict[str, Any] = {"mesh": mesh, "report": report, "preemption": preemption, "watchdog": watchdog}

    def judge() -> float:
        """The score of the newest evaluation, remembered for early stopping."""
        nonlocal best, stale
        score = primary(results)[task.primary_metric]
        improved = best is None or (score is not None and score > best)
        best, stale = (score, 0) if improved else (best, stale + 1)
        return score

    def stale_enough() -> bool:
        return 0 < early_stopping <= stale

    over = step >= total_steps or stale_enough()
    try:
        if over:
            report.log(f"finished: the newest checkpoint is of step {step} of {total_steps}; evaluating it")
        if over or evaluation_due:
            results = evaluate_state(task, state, evals, **evaluating)
        if evaluation_due:
            judge()
            over = over or stale_enough()
    except PreemptedError:
        stop = True

    train_step = make_train_step(task, optimizer, seed=seed, ema_decay=ema_decay, accumulate=accumulate, guard=guard)
    batches, spec = train_loader.batches(step), task.batch_spec()
    metadata = UNEVALUATED  # of the newest step
    unreported: list[StepReport] = []
    before: StepReport | None = None  # of the step before the newest
    recent: collections.deque[tuple[int, dict[str, Array]]] = collections.deque(maxlen=3)

    def raise_if_unhealthy(outcome: StepReport, step: int) -> None:
        try:
            check(outcome, step, guard)
        except ArithmeticError as error:
            bundle = debug_folder / f"step_{step}"
            nonfinite.write_bundle(bundle, step, outcome.finite, dict(recent))
            raise type(error)(
                f"{error}; the last batches are in {bundle}, the checkpoints before it are good. Lower "
                "optim.learning_rate, set optim.clip_norm, or skip single updates with skip_updates.norm_factor, and "
                "resume with --resume_changed"
            ) from error

    @contextlib.contextmanager
    def saving_on_data_errors() -> Iterator[None]:
        """Save the newest state before an error in the data ends the run; of several processes each ends alone."""
        try:
            yield
        except DataError as error:
            if step == first or jax.process_count() > 1:
                raise
            raise_if_unhealthy(add_state_flags(state, before), step - 1)
            unevaluated = {**UNEVALUATED, "best": best, "stale": stale}
            checkpointer.save(step, state, **unevaluated)
            while not checkpointer.wait():
                checkpointer.save(step, state, **unevaluated, again=True)
            raise DataError(f"{error}; saved at step {step}") from error

    while not over and not stop:
        watchdog.heartbeat("waiting for data", step)
        with report.waiting_for_data(), saving_on_data_errors():
            rows = next(batches)
            rows = preemption.attach_request({name: rows[name] for name in spec}, save_again=checkpointer.failed())
            batch = to_devices(rows, mesh)
        if step == 0:
            report.images(0, to_host(jax.jit(task.summary_images)(batch)))

        # A step is only dispatched: while the device works on it, the step before is checked and the next batch is
        # fetched. So at most two steps are in flight, and failures and stop requests are seen one step late.
        watchdog.heartbeat(COMPILING if step == first else TRAINING, step)
        if step == first:
            report.waiting("compiling the training step")
        profiler.before(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step), jax.transfer_guard("disallow"):
            state, outcome = train_step(state, task.constants, batch)
        profiler.after(step, outcome)
        if step % CHECK_STATE_EVERY == 0:
            outcome = add_state_flags(state, outcome)
        recent.append((step, batch))
        request = 0
        if before is not None:
            raise_if_unhealthy(before, step - 1)
            request = int(before.request)
        before = outcome
        unreported.append(outcome)
        step += 1
        last, stop = step == total_steps, request == STOP
        over = last
        report.tick(step)
        if step == first + 1:
            jax.block_until_ready(outcome)
            report.first_step_done()

        if step % log_every == 0 or last:
            scalars = averages([each.sums for each in unreported])
            scalars["learning_rate"] = float(optimizer.schedule(step - 1))
            if guard.norm_factor:
                scalars["skipped_updates"] = sum(float(each.skipped) for each in unreported)
            report.training(step, scalars, steps=len(unreported))
            unreported = []
        # Evaluate before saving: a run killed in between evaluates this step again rather than never.
        metadata = UNEVALUATED
        if (step % eval_every == 0 or last) and not stop:
            raise_if_unhealthy(add_state_flags(state, outcome), step - 1)
            try:
                with saving_on_data_errors():
                    results = evaluate_state(task, state, evals, **evaluating)
                metadata = {"evaluated": True, "score": judge()}
                if stale_enough() and not last:
                    report.log(f"early stopping: no better {task.primary_metric} in {stale} evaluations")
                    over = True
            except PreemptedError:
                stop = True
        if step % checkpoint_every == 0 or over or stop or request == SAVE_AGAIN:
            raise_if_unhealthy(add_state_flags(state, outcome), step - 1)
            watchdog.heartbeat("saving", step)
            with report.pausing():
                checkpointer.save(step, state, **metadata, best=best, stale=stale, again=request == SAVE_AGAIN)

    profiler.close()
    watchdog.heartbeat("saving", step)
    while not checkpointer.wait():
        checkpointer.save(step, state, **metadata, best=best, stale=stale, again=True)
    if stop:
        return {"step": step, "stopped": preemption.name or "another process"}
    return {"step": step, **results, **digest(state), "images_per_s": report.images_per_s}


def check(outcome: StepReport, step: int, guard: grad_spikes.GradSpikeGuard) -> None:
    """Wait for a step and check its report.

    Raises:
        NotFiniteError: naming the arrays that are not finite.
        SpikesError: too many updates were skipped.
    """
    if not outcome.healthy:
        if outcome.too_many:
            raise guard.too_many_error(step)
        nonfinite.raise_if_not_finite(step, outcome.finite)


def evaluate_state(
    task: Task,
    state: TrainState,
    evals: Mapping[str, Loader],
    *,
    mesh: Mesh,
    report: Report,
    preemption: PreemptionHandler,
    watchdog: Watchdog,
    collected: Callable[[str, Collector], None] = lambda name, collector: None,
) -> dict[str, Metrics]:
    """Metrics on every evaluation set, for the parameters and for their EMA if there is one.

    {"eval": ..., "ema_eval": ..., "eval_other": ..., "ema_eval_other": ...} for the sets "eval" and "eval_other".
    `collected` gets each name and what has collected the scores of all its batches.

    Raises:
        PreemptedError: a host was asked to stop.
    """
    step = int(state.step)
    results = {}

    def beat(name: str, batch: Iterator[int], batches: int) -> None:
        watchdog.heartbeat("evaluating", step)
        report.evaluating(name, next(batch), batches)

    with report.pausing():
        for name, loader in evals.items():
            for prefix, values in {"": state.trained, EMA: state.ema}.items():
                if values:
                    watchdog.heartbeat(COMPILING, step)
                    results[prefix + name] = evaluate(
                        task,
                        values,
                        loader,
                        mesh,
                        preemption=preemption,
                        heartbeat=functools.partial(beat, prefix + name, itertools.count(1), loader.steps_per_epoch),
                        collected=functools.partial(collected, prefix + name),
                    )
        for name, metrics in results.items():
            report.evaluation(step, name, metrics)
    return results


def primary(results: Mapping[str, Metrics]) -> Metrics:
    """The metrics that choose the best checkpoint: those of the EMA if there is one."""
    return results.get(EMA + PRIMARY) or results[PRIMARY]


def averages(sums: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Sums over the examples of several batches, on the device -> means over all their examples."""
    fetched = jax.device_get(list(sums))
    totals = {name: sum(float(part[name]) for part in fetched) for name in fetched[0]}
    examples = max(totals.pop("examples"), 1.0)
    return {name: value / examples for name, value in totals.items()}


def digest(state: TrainState) -> dict[str, Any]:
    """Number of parameters, and one digest over all trained arrays (parameters, BatchNorm statistics, EMA)."""
    trained: PyTree = {**state.trained, "ema": state.ema}
    return {"params": count(state.params), "params_sha256": sha256(to_host(trained))}
