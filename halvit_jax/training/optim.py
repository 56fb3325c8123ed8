"""Optimizers and learning-rate schedules: from plain keywords to one optax transformation.

optax does the arithmetic; this file makes the choices that published recipes depend on: which parameters are decayed,
where the schedule starts and ends, and how the learning rate scales with the batch size.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from halvit_jax.protocols import Array, PyTree
from halvit_jax.trees import count, flatten, map_paths

SCALINGS: dict[str, Callable[[float], float]] = {"none": lambda _: 1.0, "linear": lambda r: r, "sqrt": math.sqrt}


class Optimizer(NamedTuple):
    """An optax transformation (`init`, `update`) and the schedule in it, to be reported.

    A parameter whose path matches one of `frozen` needs no gradient.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]
    schedule: Callable[[Array], Array]
    frozen: Sequence[str] = ()


def make_optimizer(
    *,
    name: str,
    learning_rate: float,
    scaling: str,
    base_batch_size: int,
    weight_decay: float,
    no_decay: Sequence[str],
    frozen: Sequence[str],
    layer_decay: float,
    layers: Sequence[str],
    beta1: float,
    beta2: float,
    epsilon: float,
    momentum: float,
    clip_norm: float,
    clip_adaptive: float,
    no_clip_adaptive: Sequence[str],
    schedule: str,
    warmup_epochs: float,
    warmup_steps: int,
    warmup_start: float,
    floor: float,
    step_epochs: float,
    milestones: Sequence[float],
    step_factor: float,
    batch_size: int,
    steps_per_epoch: int,
    total_steps: int,
) -> Optimizer:
    """The optimizer of `config.optim`, whose fields document the keywords.

    A parameter whose path matches one of `frozen` is not trained and does not count in norms. The order is: clip the
    gradient (whole, then adaptively, Brock et al., 2021), optimizer, weight decay, layer-wise decay, learning
    rate. Weight decay spares every parameter whose path matches one of `no_decay`. AdamW and LAMB decay the weights
    themselves; SGD adds the decay to the gradient, as PyTorch does. LAMB leaves the parameters without decay
    unadapted, as timm does.

    Raises:
        ValueError: a value that is not allowed, naming its field.
    """
    positive = {"learning_rate": learning_rate, "epsilon": epsilon, "layer_decay": layer_decay}
    _check("must be above 0", {key: (value, value > 0) for key, value in positive.items()})
    least = {"base_batch_size": base_batch_size, "weight_decay": weight_decay, "clip_norm": clip_norm}
    least |= {"clip_adaptive": clip_adaptive}
    _check("must not be negative", {key: (value, value >= 0) for key, value in least.items()})
    shares = {"beta1": beta1, "beta2": beta2, "momentum": momentum}
    _check("must lie in [0, 1)", {key: (value, 0 <= value < 1) for key, value in shares.items()})
    _check("must not be above 1", {"layer_decay": (layer_decay, layer_decay <= 1)})
    _check_choice("scaling", scaling, SCALINGS)
    if scaling != "none" and not base_batch_size:
        raise ValueError(f"optim.scaling={scaling!r} needs optim.base_batch_size, the batch optim.learning_rate is for")
    for field, patterns in {
        "no_decay": no_decay,
        "frozen": frozen,
        "no_clip_adaptive": no_clip_adaptive,
        "layers": layers,
    }.items():
        _check_patterns(field, patterns)

    factor = SCALINGS[scaling](batch_size / base_batch_size) if base_batch_size else 1.0
    rate = make_schedule(
        schedule,
        peak=learning_rate * factor,
        warmup_epochs=warmup_epochs,
        warmup_steps=warmup_steps,
        warmup_start=warmup_start,
        floor=floor,
        step_epochs=step_epochs,
        milestones=milestones,
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
    _check_choice("name", name, parts)
    clips = []
    if clip_norm:
        clips.append(optax.clip_by_global_norm(clip_norm))
    if clip_adaptive:
        adaptive = optax.adaptive_grad_clip(clip_adaptive)
        clips.append(optax.masked(adaptive, lambda params: path_mask(params, no_clip_adaptive)))
    clip = optax.chain(*clips) if clips else optax.identity()
    slowing = (_scale_layers(layer_decay, layers),) if layer_decay != 1.0 else ()
    chain = optax.chain(clip, *parts[name], *slowing, optax.scale_by_learning_rate(rate))
    if frozen:
        parts_of = functools.partial(_trained_or_frozen, frozen)
        chain = optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, parts_of)
    return Optimizer(chain.init, chain.update, rate, tuple(frozen))


def make_schedule(
    kind: str,
    *,
    peak: float,
    warmup_epochs: float,
    warmup_steps: int,
    warmup_start: float,
    floor: float,
    step_epochs: float,
    milestones: Sequence[float],
    step_factor: float,
    steps_per_epoch: int,
    total_steps: int,
) -> Callable[[Array], Array]:
    """Learning rate of a step: linear warm-up from `warmup_start`, then one of

    cosine:               floor + (peak - floor) (1 + cos(pi step / total_steps)) / 2, counted from step 0, as in timm
    cosine_after_warmup:  the same, counted from the end of the warm-up, as in torchvision
    step:                 peak * step_factor ** (number of `milestones` passed, else of whole `step_epochs`)
    constant:             peak

    The warm-up takes `warmup_steps`, or `warmup_epochs` where that is 0; `milestones` are in epochs.

    Raises:
        ValueError: a value that is not allowed, naming its field.
    """
    least = {"warmup_epochs": warmup_epochs, "warmup_steps": warmup_steps}
    least |= {"warmup_start": warmup_start, "floor": floor}
    _check("must not be negative", {key: (value, value >= 0) for key, value in least.items()})
    positive = {"step_epochs": step_epochs, "step_factor": step_factor}
    _check("must be above 0", {key: (value, value > 0) for key, value in positive.items()})
    if any(later <= earlier for earlier, later in itertools.pairwise((0.0, *milestones))):
        raise ValueError(f"optim.milestones={tuple(milestones)} must be epochs above 0 that increase")
    given = f"warmup_steps={warmup_steps}" if warmup_steps else f"warmup_epochs={warmup_epochs}"
    warmup = warmup_steps or round(warmup_epochs * steps_per_epoch)

    def reductions(step: Array) -> Array:
        if milestones:
            passed = [jnp.float32(step >= round(epoch * steps_per_epoch)) for epoch in milestones]
            return sum(passed)
        return jnp.floor(step / (step_epochs * steps_per_epoch))

    def cosine(step: Array, total: int) -> Array:
        return floor + (peak - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * step / total))

    bodies = {
        "cosine": lambda step: cosine(step, total_steps),
        "cosine_after_warmup": lambda step: cosine(step - warmup, total_steps - warmup),
        "step": lambda step: peak * step_factor ** reductions(step),
        "constant": lambda step: jnp.asarray(peak),
    }
    _check_choice("schedule", kind, bodies)
    if warmup >= total_steps:
        raise ValueError(
            f"optim.{given} are {warmup} steps of {total_steps} in all; lower optim.{given.partition('=')[0]} or train "
            "longer"
        )
    body = bodies[kind]

    def rate(step: Array) -> Array:
        step = jnp.minimum(step, total_steps)
        passed = step.astype(float)
        rising = warmup_start + (peak - warmup_start) * passed / max(warmup, 1)
        return jnp.where(step < warmup, rising, body(passed))

    return rate


def path_mask(params: PyTree, excluded: Sequence[str]) -> PyTree:
    """A tree of bools: False if one of the regular expressions is found in the parameter's path."""
    return map_paths(lambda path, _: not any(re.search(pattern, path) for pattern in excluded), params)


def layer_numbers(paths: Sequence[str], layers: Sequence[str]) -> dict[str, int]:
    """{path: number of its layer, counted from the input}.

    `layers` are regular expressions from the input to the output. A path belongs to the first that is found in it; a
    group in the expression, such as `block([0-9]+)`, cuts what it matches into layers by that number.

    Raises:
        ValueError: a path that none of them matches.
    """

    def place(path: str) -> tuple[int, int]:
        for i, pattern in enumerate(layers):
            match = re.search(pattern, path)
            if match:
                return i, int(match[1]) if match.groups() else 0
        raise ValueError(f"optim.layers={tuple(layers)} has no layer for the parameter {path}")

    places = {path: place(path) for path in paths}
    ordered = sorted(set(places.values()))
    return {path: ordered.index(found) for path, found in places.items()}


def frozen_line(params: PyTree, frozen: Sequence[str]) -> str:
    """How many of the parameters are trained."""
    shares = jax.tree.map(lambda leaf, trained: leaf.size * trained, params, path_mask(params, frozen))
    return f"{sum(jax.tree.leaves(shares)):,} of {count(params):,} parameters are trained; optim.frozen holds the rest"


def _trained_or_frozen(frozen: Sequence[str], params: PyTree) -> PyTree:
    """The label "trained" or "frozen" of each parameter."""
    paths = list(flatten(params))
    for pattern in frozen:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"optim.frozen holds {pattern!r}, which matches no parameter; a path is e.g. {paths[0]}")
    trained = path_mask(params, frozen)
    if not any(flatten(trained).values()):
        raise ValueError(f"optim.frozen={tuple(frozen)} leaves nothing to train")
    return map_paths(lambda _, train: "trained" if train else "frozen", trained)


def _scale_layers(decay: float, layers: Sequence[str]) -> optax.GradientTransformation:
    """Scale the update of a layer by decay ** (layers above it), as in BEiT's and DeiT III's fine-tuning."""

    def scale(updates: PyTree, params: PyTree) -> PyTree:
        del params
        numbers = layer_numbers(list(flatten(updates)), layers)
        last = max(numbers.values())
        return map_paths(lambda path, update: update * decay ** (last - numbers[path]), updates)

    return optax.stateless(scale)


def _check(requirement: str, fields: dict[str, tuple[float, bool]]) -> None:
    for field, (value, fits) in fields.items():
        if not fits:
            raise ValueError(f"optim.{field}={value} {requirement}")


def _check_choice(field: str, value: str, allowed: dict) -> None:
    if value not in allowed:
        raise ValueError(f"optim.{field}={value!r} is not one of {', '.join(allowed)}")


def _check_patterns(field: str, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"optim.{field} holds {pattern!r}, which is not a regular expression: {error}") from error
