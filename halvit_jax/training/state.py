"""The train state: everything that changes in training and is saved in a checkpoint."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from halvit_jax.protocols import PyTree, Task
from halvit_jax.training.fault_tolerance.grad_spikes import OFF, GradSpikeGuard
from halvit_jax.training.optim import Optimizer
from halvit_jax.training.sharding import partition
from halvit_jax.trees import map_paths


@struct.dataclass
class TrainState:
    """`model_state`: BatchNorm statistics; `ema`: their exponential moving averages, or empty; `grad_spikes`: state of
    the guard against gradient spikes, or empty.
    """

    step: jax.Array
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    ema: PyTree
    grad_spikes: PyTree

    @property
    def trained(self) -> PyTree:
        """Parameters and statistics without averaging, in the structure of `ema`."""
        return {"params": self.params, "model_state": self.model_state}


def abstract_state(
    task: Task, optimizer: Optimizer, *, mesh: Mesh, use_ema: bool, guard: GradSpikeGuard = OFF
) -> TrainState:
    """Shapes, types and shardings of the state, without making it."""
    shapes = jax.eval_shape(lambda: _fresh(task, optimizer, 0, use_ema, guard))
    shardings = partition(shapes, ((r"^grad_spikes/", ()), *task.partition_rules), mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def init_state(
    task: Task, optimizer: Optimizer, abstract: TrainState, *, seed: int, use_ema: bool, guard: GradSpikeGuard = OFF
) -> TrainState:
    """A fresh state, created in the shardings of `abstract`, so no device ever holds more than its shards."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda: _fresh(task, optimizer, seed, use_ema, guard), out_shardings=shardings)()


def with_arrays(state: TrainState, arrays: Mapping[str, np.ndarray]) -> TrainState:
    """The state with these values of parameters and statistics, {"params/head/bias": ...}, and of their EMA."""

    def place(path: str, leaf: jax.Array) -> jax.Array:
        array = arrays.get(path.removeprefix("ema/").removeprefix("model_state/"))
        if array is None or not path.startswith(("params/", "model_state/", "ema/")):
            return leaf
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    return map_paths(place, state)


def _fresh(task: Task, optimizer: Optimizer, seed: int, use_ema: bool, guard: GradSpikeGuard) -> TrainState:
    params, model_state = task.init(jax.random.fold_in(jax.random.key(seed), 0))
    ema = {"params": params, "model_state": model_state} if use_ema else {}
    ema = jax.tree.map(jnp.copy, ema)  # separate buffers, so that the step may donate both
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, optimizer.init(params), ema, guard.init())
