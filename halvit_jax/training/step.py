"""The training step and the evaluation step: pure functions of state and batch."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from halvit_jax.protocols import Array, Batch, PyTree, Task
from halvit_jax.training.fault_tolerance import grad_spikes, nonfinite
from halvit_jax.training.fault_tolerance.preemption import WISH, wish_of
from halvit_jax.training.optim import Optimizer
from halvit_jax.training.sharding import BATCH
from halvit_jax.training.state import TrainState


class Outcome(NamedTuple):
    """What a step tells beside the new state; all of it stays on the device until somebody looks.

    `sums` of the batch; `wish`, the largest of all hosts; `healthy`, whether everything looked at is finite and not
    too many updates were left out; `finite`, {path: flag}, to say what is not; `skipped`, whether this update was left
    out; `too_many`, whether it was one too many.
    """

    sums: dict[str, Array]
    wish: Array
    healthy: Array
    finite: dict[str, Array]
    skipped: Array
    too_many: Array


TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, Outcome]]
EvalStep = Callable[[PyTree, PyTree, Batch], tuple[dict[str, Array], Array]]


def make_train_step(
    task: Task,
    optimizer: Optimizer,
    *,
    seed: int,
    ema_decay: float,
    accumulate: int = 1,
    limit: grad_spikes.Limit = grad_spikes.NO_LIMIT,
) -> TrainStep:
    """The jitted step (state, frozen, batch) -> (new state, outcome); the old state is donated.

    `accumulate` cuts the batch into as many equal parts, runs them one after the other and takes the mean of their
    gradients: the same update for less memory (mixing and BatchNorm see one part at a time). All randomness comes from
    fold_in(key(seed), step), so nothing random is saved. An update that `limit` leaves out changes nothing but `step`
    and what the limit remembers.
    """

    def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Outcome]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), state.step)
        run = functools.partial(_backward, task, state.params, frozen)
        if accumulate == 1:
            result = run(state.model_state, batch, key)
        else:
            result = _accumulated(run, state.model_state, batch, key, parts=accumulate)
        updates, opt_state = optimizer.update(result.grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(step=state.step + 1, params=params, model_state=result.model_state, opt_state=opt_state)
        if state.ema:
            new = new.replace(ema=optax.incremental_update(new.raw, state.ema, 1.0 - ema_decay))
        finite = nonfinite.flags({"loss": result.loss, "gradient": result.grads, "model_state": result.model_state})
        healthy, skipped, too_many = nonfinite.all_up(finite), jnp.zeros((), bool), jnp.zeros((), bool)
        if limit.factor:
            norm = nonfinite.norm(result.grads) + 0 * result.loss  # not finite where the loss is not
            verdict = limit.judge(state.limit, norm, state.step)
            kept = state.replace(step=new.step)
            new = jax.tree.map(functools.partial(jnp.where, verdict.skip), kept, new).replace(limit=verdict.memory)
            skipped, too_many = verdict.skip, verdict.too_many
            healthy = (healthy | skipped) & ~too_many
        return new, Outcome(result.sums, wish_of(batch), healthy, finite, skipped, too_many)

    return jax.jit(train_step, donate_argnums=0)


@jax.jit
def examine(state: TrainState, outcome: Outcome) -> Outcome:
    """The outcome of the step that made this state, with the flags of the whole state added.

    A program of its own, because hundreds of small reductions in every step take longer than they are worth: what is
    not finite in the parameters shows in the next loss, and the rest waits until somebody looks.
    """
    finite = nonfinite.flags({**state.raw, "opt_state": state.opt_state, "ema": state.ema})
    healthy = outcome.healthy & nonfinite.all_up(finite)
    return outcome._replace(healthy=healthy, finite={**outcome.finite, **finite})


def abstract_batch(mesh: Mesh, *, batch_size: int, image_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of the batches of images that a step is given."""
    size, sharding = image_size, NamedSharding(mesh, BATCH)
    rows = {"image": ((size, size, 3), jnp.uint8), "label": ((), jnp.int32), "mask": ((), bool), WISH: ((), jnp.int32)}
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in rows.items()
    }


@functools.lru_cache(maxsize=8)
def make_eval_step(task: Task) -> EvalStep:
    """The jitted step (params, model_state, batch) -> (sums of `task.score`, the largest wish of all hosts).

    The same one for the same task.
    """

    @jax.jit
    def eval_step(params: PyTree, model_state: PyTree, batch: Batch) -> tuple[dict[str, Array], Array]:
        return task.score(task.predict(params, model_state, batch), batch), wish_of(batch)

    return eval_step


class _Backward(NamedTuple):
    loss: Array
    grads: PyTree
    model_state: PyTree
    sums: dict[str, Array]


def _backward(
    task: Task, params: PyTree, frozen: PyTree, model_state: PyTree, batch: Batch, key: jax.Array
) -> _Backward:
    """The loss of one batch, its gradient, the new model state and the sums."""

    def loss_of(params: PyTree) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
        loss = task.loss(params, model_state, frozen, batch, key)
        return loss.value, (loss.model_state, loss.sums)

    (loss, (model_state, sums)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return _Backward(loss, grads, model_state, sums)


def _accumulated(
    run: Callable[..., _Backward], model_state: PyTree, batch: Batch, key: jax.Array, *, parts: int
) -> _Backward:
    """`run` on one part of the batch after the other: mean loss and gradient, last model state, summed sums.

    A part takes every `parts`-th row, so that it lies on the devices as the batch does and nothing is moved.
    """
    cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)  # [parts, b / parts, .]

    def add(so_far: _Backward, numbered: tuple[Array, Batch]) -> tuple[_Backward, None]:
        number, part = numbered
        new = run(so_far.model_state, part, jax.random.fold_in(key, number))
        grads = jax.tree.map(lambda total, grad: total + grad / parts, so_far.grads, new.grads)
        loss = so_far.loss + new.loss / parts
        return _Backward(loss, grads, new.model_state, jax.tree.map(jnp.add, so_far.sums, new.sums)), None

    shapes = jax.eval_shape(run, model_state, jax.tree.map(lambda x: x[0], cut), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = zeros._replace(model_state=model_state)
    return jax.lax.scan(add, start, (jnp.arange(parts), cut))[0]
