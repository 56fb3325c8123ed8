"""The program: read it top to bottom.

restore or begin -> for each step: batch, train step, look at the step before, report, evaluate, save -> the result.
"""

import collections
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from halvit_jax.protocols import Array, Loader, PyTree, Task
from halvit_jax.training.checkpoint.checkpointer import Checkpointer
from halvit_jax.training.checkpoint.manifest import DamagedError
from halvit_jax.training.evaluate import StoppedError, averages, evaluate, total
from halvit_jax.training.fault_tolerance import grad_spikes, nonfinite
from halvit_jax.training.fault_tolerance.preemption import SAVE_AGAIN, STOP, Signals
from halvit_jax.training.fault_tolerance.watchdog import COMPILING, TRAINING, Watchdog
from halvit_jax.training.optim import Optimizer
from halvit_jax.training.report import Report
from halvit_jax.training.sharding import to_devices, to_host
from halvit_jax.training.state import TrainState
from halvit_jax.training.step import Outcome, examine, make_eval_step, make_train_step
from halvit_jax.trees import count, sha256

EXAMINE_EVERY = 8  # steps between looks at the whole state
UNEVALUATED: dict[str, Any] = {"evaluated": False, "score": None}  # what is saved with a step beside its state


class Beginning(NamedTuple):
    """The state to go on from, and whether an evaluation is due that it was stopped before."""

    state: TrainState
    evaluation_due: bool = False


def begin(
    checkpointer: Checkpointer,
    report: Report,
    abstract: TrainState,
    fresh_state: Callable[[TrainState], TrainState],
    *,
    eval_every: int,
    restart_if_damaged: bool = False,
) -> Beginning:
    """The state of the newest checkpoint that verifies, else a fresh one; either way in the shardings of `abstract`.

    Damaged checkpoints that are newer are named and moved out of the way.

    Raises:
        DamagedError: there are checkpoints, and none verifies; `restart_if_damaged` begins anew instead.
        ValueError: the checkpoint that is there belongs to another model or optimizer.
    """
    try:
        restored = checkpointer.restore(abstract)
    except DamagedError as error:
        if not restart_if_damaged:
            raise DamagedError(f"no checkpoint is good: {error}; begin anew with --restart_if_damaged") from error
        report.say(f"WARNING: {error}; beginning anew")
        checkpointer.set_aside(checkpointer.steps())
        restored = None
    if restored is None:
        return Beginning(fresh_state(abstract))
    checkpointer.set_aside(list(restored.damaged))
    report.say(f"going on from the checkpoint of step {restored.step}")
    return Beginning(restored.state, restored.step % eval_every == 0 and not restored.facts["evaluated"])


def train(
    task: Task,
    optimizer: Optimizer,
    beginning: Beginning,
    train_loader: Loader,
    eval_loader: Loader,
    *,
    mesh: Mesh,
    checkpointer: Checkpointer,
    report: Report,
    signals: Signals,
    watchdog: Watchdog,
    debug_folder: pathlib.Path,
    seed: int,
    total_steps: int,
    log_every: int,
    eval_every: int,
    checkpoint_every: int,
    ema_decay: float,
    accumulate: int = 1,
    limit: grad_spikes.Limit = grad_spikes.NO_LIMIT,
) -> dict[str, Any]:
    """Train to `total_steps` and return the run's result; or, asked to stop, save and return {"step", "stopped"}.

    Stopped or killed at any time and begun again, it ends with the same parameters, bit for bit.

    Raises:
        NotFiniteError, SpikesError: at most two steps late where the loss, a gradient or a statistic is not finite,
            at most ten where only another part of the state is not; the last batches are in `debug_folder`, the state
            is not saved.
        SaveError: a checkpoint could not be written.
    """
    state, evaluation_due = beginning
    step = first = int(state.step)
    report.parameters(state.params)
    results: dict[str, dict[str, float]] = {}
    stop = False
    evaluating: dict[str, Any] = {"mesh": mesh, "report": report, "signals": signals, "watchdog": watchdog}
    try:
        if step >= total_steps:
            report.say(f"finished: the newest checkpoint is of step {step} of {total_steps}; evaluating it")
        if step >= total_steps or evaluation_due:
            results = evaluate_state(task, state, eval_loader, **evaluating)
    except StoppedError:
        stop = True

    train_step = make_train_step(task, optimizer, seed=seed, ema_decay=ema_decay, accumulate=accumulate, limit=limit)
    batches = train_loader.batches(step)
    facts = UNEVALUATED  # of the newest step
    unreported: list[Outcome] = []
    before: Outcome | None = None  # of the step before the newest
    recent: collections.deque[tuple[int, dict[str, Array]]] = collections.deque(maxlen=3)

    def look_at(outcome: Outcome, step: int) -> None:
        try:
            check(outcome, step, limit)
        except ArithmeticError as error:
            bundle = debug_folder / f"step_{step}"
            nonfinite.write_bundle(bundle, step, outcome.finite, dict(recent))
            raise type(error)(
                f"{error}; the last batches are in {bundle}, the checkpoints before it are good. Lower "
                "optim.learning_rate, set optim.clip_norm, or leave single updates out with skip_updates.norm_factor"
            ) from error

    while step < total_steps and not stop:
        watchdog.at("waiting for data", step)
        with report.waiting_for_data():
            rows = signals.stamp(next(batches), save_again=checkpointer.failed())
            batch = to_devices(rows, mesh)
        if step == 0:
            report.images(0, to_host(jax.jit(task.summary_images)(batch)))

        # A step is only dispatched: while the device works on it, the step before is looked at and the next batch is
        # fetched. So at most two steps are under way, and what is wrong or wished is known one step later.
        watchdog.at(COMPILING if step == first else TRAINING, step)
        state, outcome = train_step(state, task.frozen, batch)
        if step % EXAMINE_EVERY == 0:
            outcome = examine(state, outcome)
        recent.append((step, batch))
        wish = 0
        if before is not None:
            look_at(before, step - 1)
            wish = int(before.wish)
        before = outcome
        unreported.append(outcome)
        step += 1
        last, stop = step == total_steps, wish == STOP
        if step == first + 1:
            jax.block_until_ready(outcome)
            report.first_step_done()

        if step % log_every == 0 or last:
            scalars = averages(total([each.sums for each in unreported]))
            scalars["learning_rate"] = float(optimizer.schedule(step - 1))
            if limit.factor:
                scalars["left_out"] = sum(float(each.skipped) for each in unreported)
            report.training(step, scalars, steps=len(unreported))
            unreported = []
        # Evaluate before saving: a run killed in between evaluates this step again rather than never.
        facts = UNEVALUATED
        if (step % eval_every == 0 or last) and not stop:
            look_at(examine(state, outcome), step - 1)
            try:
                results = evaluate_state(task, state, eval_loader, **evaluating)
                facts = {"evaluated": True, "score": results[best_of(results)][task.headline]}
            except StoppedError:
                stop = True
        if step % checkpoint_every == 0 or last or stop or wish == SAVE_AGAIN:
            look_at(examine(state, outcome), step - 1)
            watchdog.at("saving", step)
            with report.pausing():
                checkpointer.save(step, state, **facts, again=wish == SAVE_AGAIN)

    watchdog.at("saving", step)
    while not checkpointer.wait():
        checkpointer.save(step, state, **facts, again=True)
    if stop:
        return {"step": step, "stopped": signals.name or "another process"}
    return {"step": step, **results, **digest(state), "images_per_s": report.images_per_s}


def check(outcome: Outcome, step: int, limit: grad_spikes.Limit) -> None:
    """Wait for a step, and see whether it was healthy.

    Raises:
        NotFiniteError: naming what is not finite.
        SpikesError: too many updates were left out.
    """
    if not outcome.healthy:
        if outcome.too_many:
            raise limit.exceeded(step)
        nonfinite.check(step, outcome.finite)


def evaluate_state(
    task: Task,
    state: TrainState,
    loader: Loader,
    *,
    mesh: Mesh,
    report: Report,
    signals: Signals,
    watchdog: Watchdog,
) -> dict[str, dict[str, float]]:
    """Scores of the raw values and, where they are kept, of the averages: {"eval": ..., "ema_eval": ...}.

    Raises:
        StoppedError: a host was asked to stop.
    """
    step = int(state.step)
    eval_step = make_eval_step(task)
    results = {}
    with report.pausing():
        for name, values in {"eval": state.raw, "ema_eval": state.ema}.items():
            if values:
                watchdog.at(COMPILING, step)
                results[name] = evaluate(
                    eval_step, values, loader, mesh, signals=signals, moved=lambda: watchdog.at("evaluating", step)
                )
        for name, scalars in results.items():
            report.evaluation(step, name, scalars)
    return results


def best_of(results: dict[str, dict[str, float]]) -> str:
    """The evaluation that a checkpoint is judged by: of the averages where there are any."""
    return "ema_eval" if "ema_eval" in results else "eval"


def digest(state: TrainState) -> dict[str, Any]:
    """Number of parameters, and one digest over all trained arrays (parameters, BatchNorm statistics, averages)."""
    trained: PyTree = {**state.raw, "ema": state.ema}
    return {"params": count(state.params), "params_sha256": sha256(to_host(trained))}
