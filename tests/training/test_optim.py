import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.shapes import shallow
from helpers.tiers import tiered

from halvit_jax.config import default_config
from halvit_jax.models import FAMILIES
from halvit_jax.recipes import imagenet, resnet
from halvit_jax.training.optim import Optimizer, frozen_line, layer_numbers, make_optimizer, path_mask
from halvit_jax.trees import flatten, variable_shapes

DEIT = imagenet.deit("halvit_tiny").optim.to_dict()
STEPS_PER_EPOCH = 1251
PLAIN = {"scaling": "none", "schedule": "constant", "warmup_epochs": 0.0}


def _optimizer(
    fields: Mapping[str, Any] = DEIT, epochs: int = 300, batch_size: int = 1024, **changes: Any
) -> Optimizer:
    total_steps = epochs * STEPS_PER_EPOCH
    run = {"batch_size": batch_size, "steps_per_epoch": STEPS_PER_EPOCH, "total_steps": total_steps}
    return make_optimizer(**dict(fields) | run | changes)


def _rates(optimizer: Optimizer, epochs: np.ndarray) -> np.ndarray:
    return np.asarray(jax.vmap(optimizer.schedule)(jnp.asarray(np.round(epochs * STEPS_PER_EPOCH), jnp.int32)))


# Schedules.


def test_deits_learning_rate_is_the_published_curve_at_every_epoch() -> None:
    epochs = np.arange(301)
    warming = 1e-6 + (1e-3 - 1e-6) * epochs / 5
    cosine = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * epochs / 300))
    np.testing.assert_allclose(_rates(_optimizer(), epochs), np.where(epochs < 5, warming, cosine), rtol=1e-4)


def test_warm_up_rises_in_equal_steps_and_the_end_stays_at_the_floor() -> None:
    schedule = jax.vmap(_optimizer().schedule)
    rising = np.asarray(schedule(jnp.arange(5 * STEPS_PER_EPOCH)))
    np.testing.assert_allclose(np.diff(rising), (1e-3 - 1e-6) / (5 * STEPS_PER_EPOCH), rtol=0.02)
    last = 300 * STEPS_PER_EPOCH
    np.testing.assert_allclose(schedule(jnp.array([last, last + 1, 2 * last])), 1e-5, rtol=1e-4)


def test_detections_schedule_falls_at_given_epochs_after_a_warm_up_in_steps() -> None:
    fields = {"schedule": "step", "milestones": (8, 11), "warmup_steps": 500, "warmup_start": 2e-7, "step_factor": 0.1}
    optimizer = _optimizer(epochs=12, batch_size=16, **PLAIN | fields | {"learning_rate": 2e-4})
    epochs = np.array([0, 250 / STEPS_PER_EPOCH, 500 / STEPS_PER_EPOCH, 7.99, 8, 10.99, 11, 12])
    expected = [2e-7, 1.001e-4, 2e-4, 2e-4, 2e-5, 2e-5, 2e-6, 2e-6]
    np.testing.assert_allclose(_rates(optimizer, epochs), expected, rtol=1e-4)


def test_the_batch_scales_the_peak_and_neither_start_nor_floor() -> None:
    places = np.array([0, 5, 300])
    peak = 1e-5 + 0.5 * (2e-3 - 1e-5) * (1 + np.cos(np.pi * 5 / 300))
    np.testing.assert_allclose(_rates(_optimizer(batch_size=2048), places), [1e-6, peak, 1e-5], rtol=1e-4)
    unscaled = 1e-5 + 0.5 * (5e-4 - 1e-5) * (1 + np.cos(np.pi * 5 / 300))
    np.testing.assert_allclose(_rates(_optimizer(scaling="none"), places), [1e-6, unscaled, 1e-5], rtol=1e-4)


def test_the_step_schedule_is_torchvisions() -> None:
    optimizer = _optimizer(resnet.torchvision_v1("resnet50").optim.to_dict(), epochs=90, batch_size=256)
    epochs = np.array([0, 15, 29.99, 30, 59.99, 60, 89.99])
    np.testing.assert_allclose(_rates(optimizer, epochs), [0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)


def test_the_cosine_after_warmup_is_torchvisions() -> None:
    """Counted from the end of the warm-up: the peak is reached, and half of the rest is half of the way down."""
    optimizer = _optimizer(schedule="cosine_after_warmup", warmup_start=1e-5, floor=0.0)
    expected = [1e-5, 1e-3, 0.5e-3, 0.0]
    np.testing.assert_allclose(_rates(optimizer, np.array([0, 5, 152.5, 300])), expected, rtol=1e-4, atol=1e-9)


def test_a_cosine_whose_floor_is_above_the_peak_rises() -> None:
    """As Mini-DeiT's fine-tuning at 384."""
    rates = _rates(_optimizer(learning_rate=2.5e-6, scaling="none", floor=5e-6), np.array([5, 150, 300]))
    assert (np.diff(rates) > 0).all()
    assert rates[-1] == pytest.approx(5e-6, rel=1e-5)


def test_the_constant_schedule_stays_at_the_peak_after_the_warm_up() -> None:
    optimizer = _optimizer(schedule="constant")
    np.testing.assert_allclose(_rates(optimizer, np.array([0, 5, 100, 300])), [1e-6, 1e-3, 1e-3, 1e-3], rtol=1e-5)


# Optimizers, against a few steps by hand.

RNG = np.random.default_rng(0)
PARAMS = {"block": {"kernel": RNG.standard_normal((3, 2)), "bias": RNG.standard_normal(2)}}
GRADS = [{"block": {"kernel": RNG.standard_normal((3, 2)), "bias": RNG.standard_normal(2)}} for _ in range(3)]


def _train(optimizer: Optimizer) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, PARAMS)
        state = optimizer.init(params)
        for grads in GRADS:
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return {name: np.asarray(leaf) for name, leaf in params["block"].items()}


def _by_hand(name: str, step: Any) -> np.ndarray:
    """`step(parameter, gradient, memory, number)` over all gradients."""
    value, memory = PARAMS["block"][name].copy(), {}
    for number, grads in enumerate(GRADS, start=1):
        value = value - step(value, grads["block"][name], memory, number)
    return value


def _adam(grad: np.ndarray, memory: dict[str, Any], number: int) -> np.ndarray:
    memory["mu"] = 0.9 * memory.get("mu", 0.0) + 0.1 * grad
    memory["nu"] = 0.999 * memory.get("nu", 0.0) + 0.001 * grad**2
    return memory["mu"] / (1 - 0.9**number) / (np.sqrt(memory["nu"] / (1 - 0.999**number)) + 1e-8)


def test_sgd_adds_the_decay_to_the_gradient_and_the_rate_after_the_momentum() -> None:
    fields = {"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.02, "momentum": 0.9, "warmup_start": 0.01}
    schedule = {"scaling": "none", "schedule": "constant", "warmup_epochs": 2 / STEPS_PER_EPOCH}
    result = _train(_optimizer(**fields, **schedule))
    for name, decay in (("kernel", 0.02), ("bias", 0.0)):

        def step(value: Any, grad: Any, memory: dict[str, Any], number: int, decay: float = decay) -> np.ndarray:
            memory["v"] = 0.9 * memory.get("v", 0.0) + grad + decay * value
            return (0.01, 0.055, 0.1)[number - 1] * memory["v"]

        np.testing.assert_allclose(result[name], _by_hand(name, step), rtol=1e-5)


def test_adamw_decays_the_weights_themselves_and_spares_the_bias() -> None:
    result = _train(_optimizer(**PLAIN, learning_rate=0.1, weight_decay=0.5))
    for name, decay in (("kernel", 0.5), ("bias", 0.0)):
        expected = _by_hand(name, lambda p, g, memory, n, decay=decay: 0.1 * (_adam(g, memory, n) + decay * p))
        np.testing.assert_allclose(result[name], expected, rtol=1e-5)


def test_lamb_scales_an_update_to_its_weights_and_leaves_undecayed_parameters_unadapted() -> None:
    result = _train(_optimizer(**PLAIN, name="lamb", learning_rate=0.1, weight_decay=0.5))

    def adapted(value: np.ndarray, grad: np.ndarray, memory: dict[str, Any], number: int) -> np.ndarray:
        update = _adam(grad, memory, number) + 0.5 * value
        return 0.1 * np.linalg.norm(value) / np.linalg.norm(update) * update

    np.testing.assert_allclose(result["kernel"], _by_hand("kernel", adapted), rtol=1e-5)
    plain = _by_hand("bias", lambda p, g, memory, n: 0.1 * _adam(g, memory, n))
    np.testing.assert_allclose(result["bias"], plain, rtol=1e-5)


@pytest.mark.parametrize(("guard", "factor"), [(0.0, 1.0), (100.0, 1.0), (0.5, None)])
def test_clipping_limits_the_norm_of_the_whole_gradient(guard: float, factor: float | None) -> None:
    fields = {"name": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "momentum": 0.0, "clip_norm": guard}
    with jax.enable_x64(True):
        optimizer = _optimizer(**PLAIN, **fields)
        updates, _ = optimizer.update(GRADS[0], optimizer.init(PARAMS), PARAMS)
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(GRADS[0])))
    for name, grad in GRADS[0]["block"].items():
        np.testing.assert_allclose(updates["block"][name], -grad * (factor or guard / norm), rtol=1e-6)


def test_adaptive_clipping_limits_each_unit_against_its_own_weights_and_spares_the_head() -> None:
    fields = {"name": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "momentum": 0.0, "clip_adaptive": 0.02}
    params, grads = ({**tree, "head": {"kernel": tree["block"]["kernel"]}} for tree in (PARAMS, GRADS[0]))
    with jax.enable_x64(True):
        optimizer = _optimizer(**PLAIN, **fields)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    weight, grad = PARAMS["block"]["kernel"], GRADS[0]["block"]["kernel"]
    allowed = 0.02 * np.linalg.norm(weight, axis=0)  # a unit is what feeds one output
    clipped = grad * np.minimum(1.0, allowed / np.linalg.norm(grad, axis=0))
    np.testing.assert_allclose(updates["block"]["kernel"], -clipped, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["kernel"], -grad, rtol=1e-6)


def test_sqrt_scaling_takes_the_root_of_the_ratio_of_the_batches() -> None:
    optimizer = _optimizer(scaling="sqrt", batch_size=2048, schedule="constant")
    assert float(optimizer.schedule(10**6)) == pytest.approx(5e-4 * 2)


# Layers.


def test_layers_are_numbered_from_the_input_to_the_output() -> None:
    layers = default_config().optim.layers
    paths = [
        "embed/kernel",
        "position/embedding",
        "block0/norm/scale",
        "block2/a",
        "block11/a",
        "norm/bias",
        "head/bias",
    ]
    assert list(layer_numbers(paths, layers).values()) == [0, 0, 1, 2, 3, 4, 4]
    assert layer_numbers(["stem/conv/kernel", "stage1/block1/a", "stage4/a", "head/bias"], layers) == {
        "stem/conv/kernel": 0, "stage1/block1/a": 1, "stage4/a": 2, "head/bias": 3
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"optim.layers=\('\^a',\) has no layer for the parameter head/bias"):
        layer_numbers(["a", "head/bias"], ["^a"])


def test_layer_decay_slows_the_layers_near_the_input() -> None:
    fields = {"name": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "momentum": 0.0, "layer_decay": 0.5}
    params = {name: {"kernel": jnp.ones(2)} for name in ("embed", "block0", "block1", "head")}
    optimizer = _optimizer(**PLAIN, **fields)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert {name: float(-update["kernel"][0]) for name, update in updates.items()} == {
        "embed": 0.125, "block0": 0.25, "block1": 0.5, "head": 1.0
    }  # fmt: skip


# What is decayed.


def test_path_mask_is_false_where_a_pattern_is_found() -> None:
    tree = {"a": {"bias": 1, "kernel": 2}, "bias_free": 3}
    assert path_mask(tree, ["bias$", "^c"]) == {"a": {"bias": False, "kernel": True}, "bias_free": True}
    assert path_mask(tree, []) == {"a": {"bias": True, "kernel": True}, "bias_free": True}


FIRST = [next(iter(family.sizes)) for family in FAMILIES]  # all sizes of a family have the same paths


@pytest.mark.parametrize("name", tiered(FIRST, {"deit_tiny", "resnet18", "shvit_s1"}))
def test_by_default_matrices_and_convolutions_are_decayed_and_nothing_else(name: str) -> None:
    shapes = variable_shapes(shallow(name))["params"]
    mask = flatten(path_mask(shapes, default_config().optim.no_decay))
    assert mask == {path: leaf.ndim > 1 and path != "position/embedding" for path, leaf in flatten(shapes).items()}


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "optim.name='adam' is not one of adamw, lamb, sgd"),
        ({"schedule": "linear"}, "optim.schedule='linear' is not one of cosine, cosine_after_warmup, step, constant"),
        (
            {"warmup_epochs": 300.0},
            "optim.warmup_epochs=300.0 are 375300 steps of 375300 in all; lower optim.warmup_epochs or train longer",
        ),
        ({"scaling": "square"}, "optim.scaling='square' is not one of none, linear, sqrt"),
        ({"base_batch_size": 0}, "optim.scaling='linear' needs optim.base_batch_size"),
        ({"learning_rate": 0.0}, "optim.learning_rate=0.0 must be above 0"),
        ({"epsilon": 0.0}, "optim.epsilon=0.0 must be above 0"),
        ({"base_batch_size": -1}, "optim.base_batch_size=-1 must not be negative"),
        ({"weight_decay": -0.1}, "optim.weight_decay=-0.1 must not be negative"),
        ({"clip_norm": -1.0}, "optim.clip_norm=-1.0 must not be negative"),
        ({"clip_adaptive": -1.0}, "optim.clip_adaptive=-1.0 must not be negative"),
        ({"beta2": 1.0}, "optim.beta2=1.0 must lie in [0, 1)"),
        ({"momentum": -0.5}, "optim.momentum=-0.5 must lie in [0, 1)"),
        ({"layer_decay": 0.0}, "optim.layer_decay=0.0 must be above 0"),
        ({"layer_decay": 1.5}, "optim.layer_decay=1.5 must not be above 1"),
        ({"no_decay": ("bias$", "(")}, "optim.no_decay holds '(', which is not a regular expression"),
        ({"layers": ("[",)}, "optim.layers holds '[', which is not a regular expression"),
        ({"warmup_epochs": -1.0}, "optim.warmup_epochs=-1.0 must not be negative"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1 must not be negative"),
        (
            {"warmup_steps": 375300},
            "optim.warmup_steps=375300 are 375300 steps of 375300 in all; lower optim.warmup_steps or train longer",
        ),
        ({"milestones": (11, 8)}, r"optim.milestones=(11, 8) must be epochs above 0 that increase"),
        ({"floor": -1.0}, "optim.floor=-1.0 must not be negative"),
        ({"step_epochs": 0.0}, "optim.step_epochs=0.0 must be above 0"),
    ],
)
def test_impossible_fields_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _optimizer(**changes)


def test_the_number_of_trained_parameters_is_told() -> None:
    params = {"block0": {"kernel": np.zeros((30, 40))}, "head": {"bias": np.zeros(10)}}
    line = "10 of 1,210 parameters are trained; optim.frozen holds the rest"
    assert frozen_line(params, ["^block0"]) == line
