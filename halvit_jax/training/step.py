"""The training step and the evaluation step: pure functions of state and batch."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from halvit_jax.protocols import Array, Batch, PyTree, Task
from halvit_jax.training.optim import Optimizer
from halvit_jax.training.state import TrainState

TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, Array]]]


def make_train_step(task: Task, optimizer: Optimizer, *, seed: int, ema_decay: float, accumulate: int = 1) -> TrainStep:
    """The jitted step (state, frozen, batch) -> (new state, sums of this batch); the old state is donated.

    `accumulate` cuts the batch into as many equal parts, runs them one after the other and takes the mean of their
    gradients: the same update for less memory (mixing and BatchNorm see one part at a time). All randomness comes from
    fold_in(key(seed), step), so nothing random is saved.
    """

    def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), state.step)
        run = functools.partial(_backward, task, state.params, frozen)
        if accumulate == 1:
            grads, model_state, sums = run(state.model_state, batch, key)
        else:
            grads, model_state, sums = _accumulated(run, state.model_state, batch, key, parts=accumulate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state)
        if state.ema:
            new = new.replace(ema=optax.incremental_update(new.raw, state.ema, 1.0 - ema_decay))
        return new, sums

    return jax.jit(train_step, donate_argnums=0)


@functools.lru_cache(maxsize=8)
def make_eval_step(task: Task) -> Callable[[PyTree, PyTree, Batch], dict[str, Array]]:
    """The jitted step (params, model_state, batch) -> sums of `task.score`; the same one for the same task."""

    @jax.jit
    def eval_step(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, Array]:
        return task.score(task.predict(params, model_state, batch), batch)

    return eval_step


class _Backward(NamedTuple):
    grads: PyTree
    model_state: PyTree
    sums: dict[str, Array]


def _backward(
    task: Task, params: PyTree, frozen: PyTree, model_state: PyTree, batch: Batch, key: jax.Array
) -> _Backward:
    """The gradient of the loss of one batch, the new model state and the sums."""

    def loss_of(params: PyTree) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
        loss = task.loss(params, model_state, frozen, batch, key)
        return loss.value, (loss.model_state, loss.sums)

    grads, (model_state, sums) = jax.grad(loss_of, has_aux=True)(params)
    return _Backward(grads, model_state, sums)


def _accumulated(
    run: Callable[..., _Backward], model_state: PyTree, batch: Batch, key: jax.Array, *, parts: int
) -> _Backward:
    """`run` on one part of the batch after the other: mean gradient, last model state, summed sums.

    A part takes every `parts`-th row, so that it lies on the devices as the batch does and nothing is moved.
    """
    cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)  # [parts, b / parts, .]

    def add(so_far: _Backward, numbered: tuple[Array, Batch]) -> tuple[_Backward, None]:
        number, part = numbered
        new = run(so_far.model_state, part, jax.random.fold_in(key, number))
        grads = jax.tree.map(lambda total, grad: total + grad / parts, so_far.grads, new.grads)
        return _Backward(grads, new.model_state, jax.tree.map(jnp.add, so_far.sums, new.sums)), None

    shapes = jax.eval_shape(run, model_state, jax.tree.map(lambda x: x[0], cut), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = _Backward(zeros.grads, model_state, zeros.sums)
    return jax.lax.scan(add, start, (jnp.arange(parts), cut))[0]
