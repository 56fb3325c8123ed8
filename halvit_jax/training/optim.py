"""Optimizers and learning-rate schedules: from plain keywords to one optax transformation.

optax does the arithmetic; here stand the choices that make a published recipe come out: what is decayed, where the
schedule starts and ends, and how the learning rate follows the batch size.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import optax

from halvit_jax.protocols import Array, PyTree
from halvit_jax.training.paths import map_paths


class Optimizer(NamedTuple):
    """An optax transformation (`init`, `update`) and the schedule in it, to be reported."""

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]
    schedule: Callable[[Array], Array]


def make_optimizer(
    *,
    name: str,
    learning_rate: float,
    base_batch_size: int,
    weight_decay: float,
    no_decay: Sequence[str],
    beta1: float,
    beta2: float,
    epsilon: float,
    momentum: float,
    clip_norm: float,
    schedule: str,
    warmup_epochs: float,
    warmup_start: float,
    floor: float,
    step_epochs: float,
    step_factor: float,
    batch_size: int,
    steps_per_epoch: int,
    total_steps: int,
) -> Optimizer:
    """The optimizer of `config.optim`, whose fields say what each keyword is.

    Weight decay spares every parameter whose path matches one of `no_decay`. AdamW and LAMB decay the weights
    themselves; SGD adds the decay to the gradient, as PyTorch does. LAMB leaves the parameters without decay
    unadapted, as timm does.
    """
    peak = learning_rate * (batch_size / base_batch_size if base_batch_size else 1.0)
    rate = make_schedule(
        schedule,
        peak=peak,
        warmup_epochs=warmup_epochs,
        warmup_start=warmup_start,
        floor=floor,
        step_epochs=step_epochs,
        step_factor=step_factor,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )

    def decayed(params: PyTree) -> PyTree:
        return path_mask(params, no_decay)

    decay = optax.add_decayed_weights(weight_decay, mask=decayed)
    adam = optax.scale_by_adam(beta1, beta2, epsilon)
    parts = {
        "adamw": (adam, decay),
        "lamb": (adam, decay, optax.masked(optax.scale_by_trust_ratio(), decayed)),
        "sgd": (decay, optax.trace(momentum)),
    }
    if name not in parts:
        raise ValueError(f"optim.name={name!r} is not one of {', '.join(parts)}")
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    chain = optax.chain(clip, *parts[name], optax.scale_by_learning_rate(rate))
    return Optimizer(chain.init, chain.update, rate)


def make_schedule(
    kind: str,
    *,
    peak: float,
    warmup_epochs: float,
    warmup_start: float,
    floor: float,
    step_epochs: float,
    step_factor: float,
    steps_per_epoch: int,
    total_steps: int,
) -> Callable[[Array], Array]:
    """Learning rate of a step: linear warm-up from `warmup_start`, then one of

    cosine:    floor + (peak - floor) (1 + cos(pi step / total_steps)) / 2, counted from step 0, warm-up included
    step:      peak * step_factor ** (number of whole `step_epochs` passed)
    constant:  peak
    """
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    bodies = {
        "cosine": lambda step: floor + (peak - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * step / total_steps)),
        "step": lambda step: peak * step_factor ** jnp.floor(step / (step_epochs * steps_per_epoch)),
        "constant": lambda step: jnp.asarray(peak),
    }
    if kind not in bodies:
        raise ValueError(f"optim.schedule={kind!r} is not one of {', '.join(bodies)}")
    if warmup_steps >= total_steps:
        raise ValueError(
            f"optim.warmup_epochs={warmup_epochs} are {warmup_steps} steps of {total_steps} in all; "
            "lower optim.warmup_epochs or train longer"
        )
    body = bodies[kind]

    def rate(step: Array) -> Array:
        step = jnp.minimum(step, total_steps)
        rising = warmup_start + (peak - warmup_start) * step / max(warmup_steps, 1)
        return jnp.where(step < warmup_steps, rising, body(step))

    return rate


def path_mask(params: PyTree, excluded: Sequence[str]) -> PyTree:
    """A tree of bools: False where one of the regular expressions is found in the parameter's path."""
    return map_paths(lambda path, _: not any(re.search(pattern, path) for pattern in excluded), params)
