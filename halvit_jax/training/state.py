"""The train state: everything that changes, and so everything that a checkpoint holds."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from halvit_jax.protocols import PyTree, Task
from halvit_jax.training.optim import Optimizer
from halvit_jax.training.sharding import partition


@struct.dataclass
class TrainState:
    """`model_state`: BatchNorm statistics; `ema`: averages of params and model_state, or empty."""

    step: jax.Array
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    ema: PyTree

    @property
    def raw(self) -> PyTree:
        """The trained values under the names that `ema` gives their averages."""
        return {"params": self.params, "model_state": self.model_state}


def abstract_state(task: Task, optimizer: Optimizer, *, mesh: Mesh, use_ema: bool) -> TrainState:
    """Shapes, types and shardings of the state, without making it."""
    shapes = jax.eval_shape(lambda: _fresh(task, optimizer, 0, use_ema))
    shardings = partition(shapes, task.partition_rules, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def init_state(task: Task, optimizer: Optimizer, abstract: TrainState, *, seed: int, use_ema: bool) -> TrainState:
    """A fresh state, born in the shardings of `abstract`: no device ever holds more than its share."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda: _fresh(task, optimizer, seed, use_ema), out_shardings=shardings)()


def _fresh(task: Task, optimizer: Optimizer, seed: int, use_ema: bool) -> TrainState:
    params, model_state = task.init(jax.random.fold_in(jax.random.key(seed), 0))
    ema = {"params": params, "model_state": model_state} if use_ema else {}
    ema = jax.tree.map(jnp.copy, ema)  # buffers of its own, so that the step may donate both
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, optimizer.init(params), ema)
