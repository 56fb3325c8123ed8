from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import classification
from jax.sharding import Mesh

from halvit_jax.config import default_config
from halvit_jax.layers.placement import Place, current
from halvit_jax.models import create_model
from halvit_jax.protocols import Batch, Loss
from halvit_jax.training.optim import Optimizer, make_optimizer
from halvit_jax.training.sharding import make_mesh, to_devices
from halvit_jax.training.state import TrainState, abstract_state, init_state
from halvit_jax.training.step import make_eval_step, make_train_step
from halvit_jax.trees import flatten

BATCH = 16


def _optimizer(**changes: Any) -> Optimizer:
    fields = {"schedule": "constant", "warmup_epochs": 0.0, "scaling": "none", "learning_rate": 0.01}
    run = {"batch_size": BATCH, "steps_per_epoch": 10, "total_steps": 100}
    return make_optimizer(**default_config().optim.to_dict() | fields | changes | run)


def _begin(task: Any, mesh: Mesh, *, use_ema: bool = False, **changes: Any) -> tuple[TrainState, Optimizer]:
    optimizer = _optimizer(**changes)
    abstract = abstract_state(task, optimizer, mesh=mesh, use_ema=use_ema)
    return init_state(task, optimizer, abstract, seed=0, use_ema=use_ema), optimizer


class Draws:
    """A task small enough to follow by hand: loss = constants * w^2 / 2; its state counts, its key is reported."""

    constants = jnp.asarray(3.0)
    partition_rules = (("", ()),)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        del key
        return {"w": jnp.array([2.0])}, {"seen": jnp.zeros(1)}

    def loss(self, params: Any, model_state: Any, constants: Any, batch: Batch, key: jax.Array) -> Loss:
        sums = {"draw": jax.random.uniform(key), "examples": batch["mask"].sum()}
        return Loss(jnp.sum(constants * params["w"] ** 2 / 2), {"seen": model_state["seen"] + 1}, sums)

    def score(self, params: Any, model_state: Any, batch: Batch) -> dict[str, jax.Array]:
        outputs = params["w"] * batch["image"] + model_state["seen"]
        return {"score": jnp.sum(outputs * batch["mask"].astype(jnp.float32))}


MASK = {"mask": np.ones(BATCH, bool)}
SGD = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 0.1}


def _run(steps: int, *, seed: int = 0, ema_decay: float = 0.0) -> tuple[list[TrainState], list[float]]:
    """Host copies of the states from step 0 on, and what the loss drew in each step."""
    task = Draws()
    state, optimizer = _begin(task, make_mesh(), use_ema=ema_decay > 0, **SGD)
    step = make_train_step(task, optimizer, seed=seed, ema_decay=ema_decay)
    states, draws = [jax.device_get(state)], []
    for _ in range(steps):
        state, outcome = step(state, task.constants, MASK)
        states.append(jax.device_get(state))
        draws.append(float(outcome.sums["draw"]))
    return states, draws


def test_a_step_counts_updates_parameters_by_the_gradient_and_keeps_the_new_model_state() -> None:
    states, _ = _run(3)
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    assert states[-1].step.dtype == np.int32
    np.testing.assert_allclose([state.params["w"][0] for state in states], 2.0 * 0.7 ** np.arange(4), rtol=1e-6)
    assert [float(state.model_state["seen"][0]) for state in states] == [0, 1, 2, 3]
    assert all(state.ema == {} for state in states)


class Places(Draws):
    """A task that notes where its parts believe to run."""

    def __init__(self) -> None:
        self.seen: list[Place] = []

    def loss(self, params: Any, model_state: Any, constants: Any, batch: Batch, key: jax.Array) -> Loss:
        self.seen.append(current())
        return super().loss(params, model_state, constants, batch, key)

    def score(self, params: Any, model_state: Any, batch: Batch) -> dict[str, jax.Array]:
        self.seen.append(current())
        return super().score(params, model_state, batch)


def test_steps_are_traced_with_the_mesh_of_their_batch() -> None:
    task, mesh = Places(), make_mesh(data=2, fsdp=2, tensor=2)
    state, optimizer = _begin(task, mesh, **SGD)
    batch = to_devices({**MASK, "image": np.ones(BATCH, np.float32)}, mesh)
    make_eval_step(task)(state.params, state.model_state, batch)
    make_train_step(task, optimizer, seed=0, ema_decay=0.0)(state, task.constants, batch)
    assert set(task.seen) == {Place("cpu", "cpu", rows=4, tensor=2)}


def test_averages_follow_parameters_and_model_state_by_their_formula() -> None:
    states, _ = _run(4, ema_decay=0.9)
    w, seen = 2.0, 0.0
    for state in states[1:]:
        w = 0.9 * w + 0.1 * float(state.params["w"][0])
        seen = 0.9 * seen + 0.1 * float(state.model_state["seen"][0])
        np.testing.assert_allclose(state.ema["params"]["w"], [w], rtol=1e-5)
        np.testing.assert_allclose(state.ema["model_state"]["seen"], [seen], rtol=1e-5)


def test_randomness_differs_by_step_and_by_seed_and_is_equal_for_an_equal_seed() -> None:
    first, again, other = (_run(4, seed=seed)[1] for seed in (0, 0, 1))
    assert first == again
    assert len(set(first + other)) == 8


def test_a_resumed_step_draws_what_the_step_drew_before() -> None:
    states, draws = _run(3)
    task = Draws()
    state, optimizer = _begin(task, make_mesh(), **SGD)
    state = state.replace(step=jax.device_put(states[2].step, state.step.sharding))
    _, outcome = make_train_step(task, optimizer, seed=0, ema_decay=0.0)(state, task.constants, MASK)
    assert float(outcome.sums["draw"]) == draws[2]


def test_the_old_state_is_donated() -> None:
    task = Draws()
    state, optimizer = _begin(task, make_mesh(), use_ema=True, **SGD)
    make_train_step(task, optimizer, seed=0, ema_decay=0.5)(state, task.constants, MASK)
    assert state.params["w"].is_deleted()
    assert state.ema["params"]["w"].is_deleted()


def test_the_evaluation_step_scores_the_predictions_and_is_one_function_for_a_task() -> None:
    task = Draws()
    step = make_eval_step(task)
    batch = {"image": jnp.arange(4.0), "mask": jnp.array([True, True, True, False])}
    report = step({"w": jnp.array([2.0])}, {"seen": jnp.array([10.0])}, batch)
    assert (int(report.request), int(report.examples)) == (0, 3)
    assert float(report.scored["score"]) == 2.0 * (0 + 1 + 2) + 3 * 10.0
    assert make_eval_step(task) is step
    assert make_eval_step(Draws()) is not step


def test_an_accumulated_step_passes_the_model_state_through_the_parts_and_draws_in_each() -> None:
    task = Draws()
    state, optimizer = _begin(task, make_mesh(), **SGD)
    new, outcome = make_train_step(task, optimizer, seed=0, ema_decay=0.0, accumulate=2)(state, task.constants, MASK)
    sums = outcome.sums
    np.testing.assert_allclose(new.params["w"], [2.0 * 0.7], rtol=1e-6)  # the mean of two equal gradients
    assert float(new.model_state["seen"][0]) == 2
    assert int(sums["examples"]) == BATCH
    draws = [float(jax.random.uniform(jax.random.fold_in(_step_key(0), part))) for part in range(2)]
    assert float(sums["draw"]) == pytest.approx(sum(draws))


def test_an_accumulated_step_is_the_whole_step() -> None:
    results = []
    for parts in (1, 2):
        state, step, batch = _tiny(make_mesh(), accumulate=parts, **SGD)
        results.append(jax.device_get(step(state, {}, batch)))
    (whole, outcome), (cut, cut_outcome) = results
    for path, value in flatten(whole.params).items():
        np.testing.assert_allclose(flatten(cut.params)[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
    for name, value in outcome.sums.items():
        assert float(cut_outcome.sums[name]) == pytest.approx(float(value), rel=1e-5), name


# One step on eight devices against one.


def _step_key(seed: int) -> jax.Array:
    """The key of step 0."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), 0)


def _one_device() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


def _tiny(
    mesh: Mesh, *, drop_path: float = 0.0, cutmix: float = 0.0, accumulate: int = 1, **optim: Any
) -> tuple[TrainState, Any, dict[str, jax.Array]]:
    """The fresh state of a tiny ViT, its step and a batch."""
    size = {"width": 48, "depth": 1, "num_heads": 3, "image_size": 8, "patch_size": 4, "num_classes": 4}
    model = create_model("halvit_tiny", **size, drop_path=drop_path)
    task = classification(model, label_smoothing=0.1, cutmix=cutmix)
    shapes, _ = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda shape: 0.1 * rng.standard_normal(shape.shape, np.float32), shapes)
    task.init = lambda key: (params, {})  # quicker to compile than the model's own
    state, optimizer = _begin(task, mesh, **optim)
    images, labels = rng.integers(0, 256, (BATCH, 8, 8, 3), np.uint8), rng.integers(0, 4, BATCH, np.int32)
    batch = to_devices({"image": images, "label": labels, **MASK}, mesh)
    return state, make_train_step(task, optimizer, seed=0, ema_decay=0.0, accumulate=accumulate), batch


def _losses(mesh: Mesh) -> tuple[list[float], tuple[int, ...]]:
    """Losses of three steps with randomness of every kind, and a device's share of the tied kernel."""
    state, step, batch = _tiny(mesh, drop_path=0.3, cutmix=1.0)
    losses = []
    for _ in range(3):
        state, outcome = step(state, {}, batch)
        losses.append(float(outcome.sums["loss"]) / BATCH)
    kernel = state.params["block0"]["ffn"]["tied"]["kernel"]
    return losses, kernel.sharding.shard_shape(kernel.shape)


@pytest.fixture(scope="module")
def on_one_device() -> list[float]:
    return _losses(_one_device())[0]


@pytest.mark.slow  # tests/training/test_mesh.py compares one step of it
@pytest.mark.parametrize(
    ("sizes", "share"),
    [
        pytest.param({"data": 8}, (48, 192), id="data=8"),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, (48, 48), id="data=2,fsdp=2,tensor=2"),
    ],
)
def test_a_step_sharded_over_eight_devices_learns_what_one_does(
    sizes: dict[str, int], share: tuple[int, ...], on_one_device: list[float]
) -> None:
    losses, found = _losses(make_mesh(**sizes))
    assert found == share
    np.testing.assert_allclose(losses, on_one_device, rtol=1e-5)


@pytest.mark.parametrize("frozen", [(), ("^below$",)])
def test_what_lies_below_frozen_parameters_is_not_run_backwards(frozen: tuple[str, ...]) -> None:
    backwards = []

    @jax.custom_vjp
    def layer(weight: jax.Array) -> jax.Array:
        return 3 * weight

    def run_back(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        backwards.append(gradient.shape)
        return (3 * gradient,)

    layer.defvjp(lambda weight: (layer(weight), None), run_back)

    class TwoLayers(Draws):
        def init(self, key: jax.Array) -> tuple[Any, Any]:
            return {"below": jnp.array([1.0]), **super().init(key)[0]}, {}

        def loss(self, params: Any, model_state: Any, constants: Any, batch: Batch, key: jax.Array) -> Loss:
            return Loss(jnp.sum(layer(params["below"]) * params["w"]), {}, {"examples": batch["mask"].sum()})

    task = TwoLayers()
    state, optimizer = _begin(task, make_mesh(), **SGD, frozen=frozen)
    state, _ = make_train_step(task, optimizer, seed=0, ema_decay=0.0)(state, task.constants, MASK)
    assert len(backwards) == (0 if frozen else 1)
    assert float(state.params["below"][0]) == pytest.approx(1.0 if frozen else 0.4)  # 1 - 0.1 * 3 * 2
    assert float(state.params["w"][0]) == pytest.approx(1.7)  # 2 - 0.1 * 3
