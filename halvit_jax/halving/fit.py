"""The label-free fit of one tied feed-forward layer, with its norm, to what a teacher's layer computes.

    min |ffn(norm(x)) - y|^2 / var(y)        Adam, cosine; small batches of tokens x with the teacher's outputs y

The batch of a step is a function of (seed, step), so a fit that stops and goes on ends with the same values. It is
split over the devices; the parameters are whole on each.

Shapes: `m` tokens, `s` steps, `t` tokens of a step, `d` width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any
Layer = Callable[[PyTree, jax.Array], jax.Array]  # (parameters, tokens [..., d]) -> the layer's outputs
CHUNK = 50  # steps of one call, after which a stop request is seen


class FitState(NamedTuple):
    """Parameters, moments and number of steps done."""

    params: PyTree
    moments: PyTree
    step: int


class Stopped(Exception):  # noqa: N818
    """A stop was requested; the state of the fit so far."""

    def __init__(self, state: FitState) -> None:
        super().__init__(state)
        self.state = state


def fit(
    layer: Layer,
    start: FitState | PyTree,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    sharding: NamedSharding | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> PyTree:
    """The fitted parameters, as NumPy arrays.

    Args:
        layer: what is fitted; equal functions are compiled once.
        start: initial parameters, or the state of a stopped fit.
        inputs: tokens [m, d].
        targets: the teacher's outputs [m, d].
        steps: length of the fit.
        batch: tokens of a step, a multiple of the devices.
        learning_rate: peak, at the first step.
        seed: of the order of tokens.
        sharding: of an array whose first axis is the batch; None: one device.
        stop: asked after every CHUNK steps.

    Raises:
        Stopped: `stop` has answered True; with the state to go on from.
    """
    state = start if isinstance(start, FitState) else begin(start, steps=steps, learning_rate=learning_rate)
    whole, rows = _placements(sharding)
    params, moments = (jax.device_put(tree, whole) for tree in (state.params, state.moments))
    size = float(np.var(targets, axis=0, dtype=np.float64).sum()) or 1.0
    step = state.step
    while step < steps:
        length = min(CHUNK, steps - step)
        chosen = np.stack([_tokens_of(seed, each, len(inputs), batch) for each in range(step, step + length)])
        batches = jax.device_put((inputs[chosen], targets[chosen]), rows)  # [s, t, d]
        params, moments = _steps(layer, steps, learning_rate, params, moments, batches, size)
        step += length
        if step < steps and stop():
            raise Stopped(FitState(*jax.device_get((params, moments)), step))
    return jax.device_get(params)


def begin(params: PyTree, *, steps: int, learning_rate: float) -> FitState:
    """The state of a fit before its first step."""
    return FitState(params, _optimizer(steps, learning_rate).init(params), 0)


def relative_error(layer: Layer, params: PyTree, inputs: np.ndarray, targets: np.ndarray, *, batch: int) -> float:
    """|layer(x) - y|^2 / |y - mean y|^2 over all tokens: 1 is as good as a constant."""
    left = 0.0
    for first in range(0, len(inputs), batch):
        part = slice(first, first + batch)
        rows = np.zeros((batch, inputs.shape[1]), np.float32)  # of one shape, so that one function is compiled
        rows[: len(inputs[part])] = inputs[part]
        found = np.asarray(_apply(layer, params, rows), np.float64)[: len(inputs[part])]
        left += np.sum((found - targets[part]) ** 2)
    size = np.var(targets, axis=0, dtype=np.float64).sum() * len(targets)
    return float(left / (size or 1.0))


def normed(norm: nn.Module, module: nn.Module, params: PyTree, tokens: jax.Array) -> jax.Array:
    """`module` behind `norm`, with the parameters {"norm": ..., "module": ...}."""
    tokens = norm.apply({"params": params["norm"]}, tokens)
    return module.apply({"params": params["module"]}, tokens, train=False)


_apply = jax.jit(lambda layer, params, tokens: layer(params, tokens), static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _steps(
    layer: Layer, steps: int, learning_rate: float, params: PyTree, moments: PyTree, batches: Any, size: float
) -> tuple[PyTree, PyTree]:
    """The steps of some batches ([s, t, d], [s, t, d])."""
    optimizer = _optimizer(steps, learning_rate)

    def one(carry: tuple[PyTree, PyTree], batch: tuple[jax.Array, jax.Array]) -> tuple[tuple[PyTree, PyTree], None]:
        params, moments = carry
        tokens, wanted = batch

        def loss(params: PyTree) -> jax.Array:
            return jnp.sum((layer(params, tokens) - wanted) ** 2, axis=-1).mean() / size

        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(one, (params, moments), batches)[0]


def _optimizer(steps: int, learning_rate: float) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))


def _tokens_of(seed: int, step: int, tokens: int, batch: int) -> np.ndarray:
    return np.random.default_rng((seed, step)).integers(0, tokens, batch)


def _placements(sharding: NamedSharding | None) -> tuple[Any, Any]:
    """Of parameters and of batches [s, t, d]."""
    if sharding is None:
        return None, None
    return NamedSharding(sharding.mesh, PartitionSpec()), NamedSharding(
        sharding.mesh, PartitionSpec(None, *sharding.spec)
    )
