"""The training step and the evaluation step: pure functions of state and batch."""

import functools
from collections.abc import Callable

import jax
import optax

from halvit_jax.protocols import Array, Batch, PyTree, Task
from halvit_jax.training.optim import Optimizer
from halvit_jax.training.state import TrainState

TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, Array]]]


def make_train_step(task: Task, optimizer: Optimizer, *, seed: int, ema_decay: float) -> TrainStep:
    """The jitted step (state, frozen, batch) -> (new state, sums of this batch); the old state is donated.

    All randomness comes from fold_in(key(seed), step), so nothing random is saved.
    """

    def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), state.step)

        def loss_of(params: PyTree) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
            loss = task.loss(params, state.model_state, frozen, batch, key)
            return loss.value, (loss.model_state, loss.sums)

        grads, (model_state, sums) = jax.grad(loss_of, has_aux=True)(state.params)
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
