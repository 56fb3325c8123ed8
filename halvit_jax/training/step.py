"""The training step and the evaluation step: pure functions of state and batch."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from halvit_jax.protocols import Array, ArraySpec, Batch, PyTree, Task
from halvit_jax.training.fault_tolerance import grad_spikes, nonfinite
from halvit_jax.training.fault_tolerance.preemption import REQUEST, requested
from halvit_jax.training.optim import Optimizer, path_mask
from halvit_jax.training.sharding import BATCH
from halvit_jax.training.state import TrainState


class StepReport(NamedTuple):
    """Per-step outputs besides the state; kept on the device until read.

    `sums` of the batch; `request`, the largest of all hosts; `healthy`: everything checked is finite and not too many
    updates were skipped; `finite`: {path: flag}; `skipped`: this update was skipped; `too_many`: more than
    allowed were.
    """

    sums: dict[str, Array]
    request: Array
    healthy: Array
    finite: dict[str, Array]
    skipped: Array
    too_many: Array


TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, StepReport]]


class EvalReport(NamedTuple):
    """Outputs of an evaluation step: `Task.score`, the number of real examples, the largest request of all hosts."""

    scored: PyTree
    examples: Array
    request: Array


EvalStep = Callable[[PyTree, PyTree, Batch], EvalReport]


def make_train_step(
    task: Task,
    optimizer: Optimizer,
    *,
    seed: int,
    ema_decay: float,
    accumulate: int = 1,
    guard: grad_spikes.GradSpikeGuard = grad_spikes.OFF,
) -> TrainStep:
    """The jitted step (state, constants, batch) -> (new state, report); the old state is donated.

    `accumulate` is the number of equal parts of the batch that are run one after the other; their gradients are
    averaged: the same update for less memory (mixing and BatchNorm see one part at a time). All randomness comes from
    fold_in(key(seed), step), so nothing random is saved. An update that `guard` skips changes nothing but `step`
    and the guard's own state.
    """

    @_on_its_mesh
    def train_step(state: TrainState, constants: PyTree, batch: Batch) -> tuple[TrainState, StepReport]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), state.step)
        run = functools.partial(_backward, task, optimizer.frozen, state.params, constants)
        if accumulate == 1:
            result = run(state.model_state, batch, key)
        else:
            result = _accumulated(run, state.model_state, batch, key, parts=accumulate)
        updates, opt_state = optimizer.update(result.grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(step=state.step + 1, params=params, model_state=result.model_state, opt_state=opt_state)
        if state.ema:
            new = new.replace(ema=optax.incremental_update(new.trained, state.ema, 1.0 - ema_decay))
        parts = {"loss": result.loss, "gradient": result.grads, "model_state": result.model_state}
        finite = nonfinite.finite_flags(parts)
        healthy, skipped, too_many = nonfinite.all_finite(finite), jnp.zeros((), bool), jnp.zeros((), bool)
        if guard.norm_factor:
            norm = nonfinite.global_norm(result.grads) + 0 * result.loss  # not finite where the loss is not
            decision = guard.update(state.grad_spikes, norm, state.step)
            kept = state.replace(step=new.step)
            new = jax.tree.map(functools.partial(jnp.where, decision.skip), kept, new)
            new = new.replace(grad_spikes=decision.state)
            skipped, too_many = decision.skip, decision.too_many
            healthy = (healthy | skipped) & ~too_many
        return new, StepReport(result.sums, requested(batch), healthy, finite, skipped, too_many)

    return jax.jit(train_step, donate_argnums=0)


@jax.jit
def add_state_flags(state: TrainState, outcome: StepReport) -> StepReport:
    """The report of the step that made this state, with the flags of the whole state added.

    A separate program, because hundreds of small reductions would slow down every step: parameters
    that are not finite show in the next loss, and the rest waits until this is called.
    """
    finite = nonfinite.finite_flags({**state.trained, "opt_state": state.opt_state, "ema": state.ema})
    healthy = outcome.healthy & nonfinite.all_finite(finite)
    return outcome._replace(healthy=healthy, finite={**outcome.finite, **finite})


def abstract_batch(mesh: Mesh, spec: Mapping[str, ArraySpec], *, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of the batches that a step gets; `spec` is `Task.batch_spec()`."""
    rows = {**spec, REQUEST: jax.ShapeDtypeStruct((), jnp.int32)}
    return {
        name: jax.ShapeDtypeStruct((batch_size, *one.shape), one.dtype, sharding=NamedSharding(mesh, BATCH))
        for name, one in rows.items()
    }


@functools.lru_cache(maxsize=8)
def make_eval_step(task: Task) -> EvalStep:
    """The jitted step (params, model_state, batch) -> report. Cached, so a task is compiled once."""

    @jax.jit
    @_on_its_mesh
    def eval_step(params: PyTree, model_state: PyTree, batch: Batch) -> EvalReport:
        return EvalReport(task.score(params, model_state, batch), jnp.sum(batch["mask"]), requested(batch))

    return eval_step


def _on_its_mesh(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, traced with the mesh of its batch, its last argument, as the current one.

    Layers read from it for which platform they are compiled, and split kernels over its devices.
    """

    @functools.wraps(step)
    def traced(*given: Any) -> Any:
        mesh = jax.typeof(jax.tree.leaves(given[-1])[0]).sharding.mesh
        with jax.sharding.use_abstract_mesh(mesh):
            return step(*given)

    return traced


class _Backward(NamedTuple):
    loss: Array
    grads: PyTree
    model_state: PyTree
    sums: dict[str, Array]


def _backward(
    task: Task,
    frozen: Sequence[str],
    params: PyTree,
    constants: PyTree,
    model_state: PyTree,
    batch: Batch,
    key: jax.Array,
) -> _Backward:
    """The loss of one batch, its gradient, the new model state and the sums.

    The gradient of frozen parameters is 0: what lies below them all is not run backwards.
    """
    trained = path_mask(params, frozen)

    def loss_of(params: PyTree) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
        params = jax.tree.map(lambda leaf, trains: leaf if trains else jax.lax.stop_gradient(leaf), params, trained)
        loss = task.loss(params, model_state, constants, batch, key)
        return loss.value, (loss.model_state, loss.sums)

    (loss, (model_state, sums)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return _Backward(loss, grads, model_state, sums)


def _accumulated(
    run: Callable[..., _Backward], model_state: PyTree, batch: Batch, key: jax.Array, *, parts: int
) -> _Backward:
    """`run` on one part of the batch after the other: mean loss and gradient, last model state, summed sums.

    A part takes every `parts`-th row, so that it is sharded like the batch and nothing is moved.
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
