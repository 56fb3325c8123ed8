"""The program: read it top to bottom.

restore or begin -> for each step: batch, train step, report, evaluate, save -> final evaluation.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from halvit_jax.protocols import Array, Loader, PyTree, Task
from halvit_jax.training.checkpoint import Checkpointer
from halvit_jax.training.evaluate import averages, evaluate, total
from halvit_jax.training.optim import Optimizer
from halvit_jax.training.paths import count, sha256
from halvit_jax.training.report import Report
from halvit_jax.training.sharding import to_devices, to_host
from halvit_jax.training.state import TrainState, abstract_state, init_state
from halvit_jax.training.step import make_eval_step, make_train_step


def begin(
    task: Task,
    optimizer: Optimizer,
    checkpointer: Checkpointer,
    report: Report,
    *,
    mesh: Mesh,
    seed: int,
    ema_decay: float,
) -> TrainState:
    """The state of the newest checkpoint if there is one, else a fresh one; either way in its shardings.

    Raises:
        ValueError: the checkpoint that is there belongs to another model or optimizer.
    """
    use_ema = ema_decay > 0
    abstract = abstract_state(task, optimizer, mesh=mesh, use_ema=use_ema)
    if checkpointer.latest_step is None:
        return init_state(task, optimizer, abstract, seed=seed, use_ema=use_ema)
    state = checkpointer.restore(abstract)
    report.say(f"going on from the checkpoint of step {int(state.step)}")
    return state


def train(
    task: Task,
    optimizer: Optimizer,
    state: TrainState,
    train_loader: Loader,
    eval_loader: Loader,
    *,
    mesh: Mesh,
    checkpointer: Checkpointer,
    report: Report,
    seed: int,
    total_steps: int,
    log_every: int,
    eval_every: int,
    checkpoint_every: int,
    ema_decay: float,
    accumulate: int = 1,
) -> dict[str, Any]:
    """Train from `state` to `total_steps` and return the run's result.

    Killed at any time and begun again, it ends with the same parameters, bit for bit.
    """
    step = first = int(state.step)
    report.parameters(state.params)
    if step >= total_steps:
        report.say(f"finished: the newest checkpoint is of step {step} of {total_steps}; evaluating it")
        results = evaluate_state(task, state, eval_loader, mesh=mesh, report=report)

    train_step = make_train_step(task, optimizer, seed=seed, ema_decay=ema_decay, accumulate=accumulate)
    batches = train_loader.batches(step)
    unreported: list[dict[str, Array]] = []
    while step < total_steps:
        with report.waiting_for_data():
            batch = to_devices(next(batches), mesh)
        if step == 0:
            report.images(0, jax.jit(task.summary_images)(batch))

        # A step is only dispatched: the next batch is fetched while the device works. At most two are under way.
        state, sums = train_step(state, task.frozen, batch)
        jax.block_until_ready(unreported[-1:])
        unreported.append(sums)
        step += 1
        last = step == total_steps
        if step == first + 1:
            jax.block_until_ready(sums)
            report.first_step_done()

        if step % log_every == 0 or last:
            rate = float(optimizer.schedule(step - 1))
            report.training(step, {**averages(total(unreported)), "learning_rate": rate}, steps=len(unreported))
            unreported = []
        # Evaluate before saving: a run killed in between evaluates this step again rather than never.
        if step % eval_every == 0 or last:
            results = evaluate_state(task, state, eval_loader, mesh=mesh, report=report)
        if step % checkpoint_every == 0 or last:
            with report.pausing():
                checkpointer.save(step, state)

    return {"step": step, **results, **digest(state), "images_per_s": report.images_per_s}


def evaluate_state(
    task: Task, state: TrainState, loader: Loader, *, mesh: Mesh, report: Report
) -> dict[str, dict[str, float]]:
    """Scores of the raw values and, where they are kept, of the averages: {"eval": ..., "ema_eval": ...}."""
    eval_step = make_eval_step(task)
    with report.pausing():
        results = {"eval": evaluate(eval_step, state.raw, loader, mesh)}
        if state.ema:
            results["ema_eval"] = evaluate(eval_step, state.ema, loader, mesh)
        for name, scalars in results.items():
            report.evaluation(int(state.step), name, scalars)
    return results


def digest(state: TrainState) -> dict[str, Any]:
    """Number of parameters, and one digest over all trained arrays (parameters, BatchNorm statistics, averages)."""
    trained: PyTree = {**state.raw, "ema": state.ema}
    return {"params": count(state.params), "params_sha256": sha256(to_host(trained))}
