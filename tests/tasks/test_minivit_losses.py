"""The losses of a distillation against the reference implementation's values, and against their definitions."""

import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from halvit_jax.layers.attention import attention_weights
from halvit_jax.models import create_model
from halvit_jax.tasks.losses import DISTILL_LOSSES, cross_entropy, smooth_one_hot
from halvit_jax.tasks.minivit_losses import hidden_relation, layers_of, qkv_relation

LAYERS, LABELS = range(2), [3, 1, 4, 1]
WIDTHS = {"student": 64, "teacher": 96}
VIT = {"width": 32, "depth": 11, "num_heads": 2, "patch_size": 4, "image_size": 8, "num_classes": 5}


@pytest.fixture(scope="module")
def reference(golden: pathlib.Path) -> dict[str, float]:
    return json.loads((golden / "losses.json").read_text())


def _normal(weights: types.ModuleType, name: str, *shape: int) -> np.ndarray:
    return weights._rng(name).standard_normal(shape).astype(np.float32)


def _random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _variables(model: nn.Module, images: jax.Array) -> Any:
    """Values of the size that `init` gives, which takes long to compile."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return jax.tree.map(lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32), shapes)


def _kept(model: nn.Module, variables: Any, images: jax.Array, **keywords: Any) -> Any:
    """What the model answers, and what it hands out."""
    keywords |= {"train": False, "mutable": ["intermediates"]}
    return jax.jit(lambda variables, images: model.apply(variables, images, **keywords))(variables, images)


def test_relations_of_queries_keys_and_values_are_the_references(
    reference: dict[str, float], reference_weights: types.ModuleType
) -> None:
    def qkv(who: str, layer: int) -> np.ndarray:
        parts = [_normal(reference_weights, f"{who}.{layer}.{x}", 6, 49, WIDTHS[who]) for x in "qkv"]
        return np.concatenate(parts, -1)

    values = [qkv_relation(qkv("student", layer), qkv("teacher", layer)) for layer in LAYERS]
    assert values[0].shape == (6,)
    assert float(jnp.mean(jnp.stack(values))) == pytest.approx(reference["qkv_relation"], rel=1e-5)


def test_relations_of_hidden_states_are_the_references(
    reference: dict[str, float], reference_weights: types.ModuleType
) -> None:
    values = []
    for layer in LAYERS:
        pair = [_normal(reference_weights, f"{who}.{layer}.hidden", 2, 196, c) for who, c in WIDTHS.items()]
        values.append(hidden_relation(*pair))
    assert values[0].shape == (2,)
    assert float(jnp.mean(jnp.stack(values))) == pytest.approx(reference["hidden_relation"], rel=1e-5)


@pytest.mark.parametrize(("kind", "alpha", "tau"), [("soft", 1.0, 1.0), ("soft", 0.5, 3.0), ("hard", 0.5, 1.0)])
def test_teachings_are_the_references(
    kind: str, alpha: float, tau: float, reference: dict[str, float], reference_weights: types.ModuleType
) -> None:
    student, teacher = (_normal(reference_weights, f"{who}.logits", 4, 10) for who in WIDTHS)
    truth = cross_entropy(student, smooth_one_hot(jnp.asarray(LABELS), 10, 0.0))
    loss = (1 - alpha) * truth + alpha * DISTILL_LOSSES[kind](student, teacher, tau)
    assert float(loss.mean()) == pytest.approx(reference[f"distillation_{kind}_alpha{alpha}_tau{tau}"], rel=1e-5)


def test_soft_cross_entropy_is_the_references(reference: dict[str, float], reference_weights: types.ModuleType) -> None:
    student, teacher = (_normal(reference_weights, f"{who}.logits", 4, 10) for who in WIDTHS)
    loss = DISTILL_LOSSES["soft_cross_entropy"](student, teacher, 1.0)
    assert float(loss.mean()) == pytest.approx(reference["soft_cross_entropy"], rel=1e-5)
    np.testing.assert_allclose(DISTILL_LOSSES["soft_cross_entropy"](2 * student, 2 * teacher, 2.0), loss, rtol=1e-5)


@pytest.mark.parametrize("kind", DISTILL_LOSSES)
def test_who_agrees_with_the_teacher_has_nothing_to_learn(kind: str) -> None:
    teacher = _random(3, 7) * (1e4 if kind == "hard" else 1.0)
    gradient = jax.grad(lambda x: DISTILL_LOSSES[kind](x, teacher, 2.0).sum())(teacher)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("tokens", [(9,), (17,), (5, 5)])  # fewer than the larger width, more, and a map
def test_hidden_relation_is_its_definition(tokens: tuple[int, ...]) -> None:
    student, teacher = _random(2, *tokens, 8), _random(2, *tokens, 12, seed=1)

    def defined(student: jax.Array) -> jax.Array:
        cosines = []
        for x in (student.reshape(2, -1, 8), teacher.reshape(2, -1, 12)):
            x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
            cosines.append(x @ x.swapaxes(1, 2))
        return 49 * jnp.square(cosines[0] - cosines[1]).mean((1, 2))

    @jax.jit
    def both(x: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        pairs = [jax.vjp(function, x) for function in (lambda x: hidden_relation(x, teacher), defined)]
        return [(value, back(jnp.ones(2))[0]) for value, back in pairs]

    (found, gradient), (expected, expected_gradient) = both(student)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_a_token_of_zeros_has_a_loss_and_a_gradient() -> None:
    student = _random(1, 4, 8).at[:, 0].set(0.0)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: hidden_relation(x, _random(1, 4, 12)).sum()))(student)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["deit_tiny", "halvit_tiny"])
def test_layers_hand_out_their_states_in_order_when_asked(name: str) -> None:
    model = create_model(name, **VIT)
    images = _random(2, 8, 8, 3)
    variables = _variables(model, images)
    assert variables.keys() == {"params"}
    expected, state = _kept(model, variables, images)
    qkv, hidden = (layers_of(state["intermediates"], kind) for kind in ("query_key_value", "hidden"))
    assert [x.shape for x in qkv] == [(2, 5, 96)] * 11
    assert [x.shape for x in hidden] == [(2, 5, 32)] * 11
    # The last block's output is what the head sees, normalised: block10 comes after block9.
    params: Any = variables["params"]
    last = np.asarray(hidden[-1])[:, 0]
    normal = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
    logits = (normal * params["norm"]["scale"] + params["norm"]["bias"]) @ params["head"]["kernel"]
    np.testing.assert_allclose(logits + params["head"]["bias"], expected, atol=1e-5)
    # Of full width and not yet scaled: the attention follows from them.
    maps = layers_of(state["intermediates"], "weights")
    for x, weights in zip(qkv, maps, strict=True):
        query, key, _ = jnp.split(x, 3, axis=-1)
        np.testing.assert_allclose(attention_weights(query, key, num_heads=2), weights, atol=1e-6)


def test_what_is_not_asked_for_is_not_in_the_program() -> None:
    model = create_model("halvit_tiny", **VIT)
    images = _random(1, 8, 8, 3)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    asked, plain = (
        str(jax.make_jaxpr(lambda v, kept=kept: model.apply(v, images, train=False, mutable=kept))(shapes))
        for kept in (["intermediates"], [])
    )
    assert asked.count("concatenate") == plain.count("concatenate") + 11


def test_a_block_that_runs_twice_has_two_layers() -> None:
    kept = {
        "stage2": {"block0": {"attention": {"query_key_value": (5, 6)}}},
        "stage1": {
            "block10": {"attention": {"query_key_value": (4,)}},
            "block9": {"attention": {"query_key_value": (2, 3), "weights": (0,)}},
        },
        "stage0": {"block0": {"repeat1": {"hidden": (8,)}, "repeat0": {"hidden": (7,)}}},
    }
    assert layers_of(kept, "query_key_value") == [2, 3, 4, 5, 6]
    assert layers_of(kept, "hidden") == [7, 8]


@pytest.mark.parametrize(
    ("name", "fields"),
    [("swin_tiny", {}), pytest.param("mini_swin_tiny", {"shares": (2, 4)}, marks=pytest.mark.slow)],
)
def test_windows_hand_out_their_states_and_blocks_whole_maps(name: str, fields: dict[str, Any]) -> None:
    small = {"width": 32, "depths": (2, 4), "head_width": 16, "window_size": 4, "image_size": 32, "num_classes": 5}
    model = create_model(name, **small | fields)
    images = _random(2, 32, 32, 3)
    last, kept = _kept(model, _variables(model, images), images, method="features")
    state = kept["intermediates"]
    assert [x.shape for x in layers_of(state, "query_key_value")] == [(2 * 4, 16, 96)] * 2 + [(2, 16, 192)] * 4
    hidden = layers_of(state, "hidden")
    assert [x.shape for x in hidden] == [(2, 8, 8, 32)] * 2 + [(2, 4, 4, 64)] * 4
    np.testing.assert_allclose(hidden[-1], last[8], atol=1e-6)


def test_every_run_of_a_shared_block_is_a_layer() -> None:
    model = create_model("mini_deit_tiny", **VIT | {"depth": 6, "share": 3})
    images = _random(2, 8, 8, 3)
    state = _kept(model, _variables(model, images), images)[1]["intermediates"]
    assert [x.shape for x in layers_of(state, "query_key_value")] == [(2, 4, 96)] * 6
    hidden = layers_of(state, "hidden")
    assert [x.shape for x in hidden] == [(2, 4, 32)] * 6
    assert len({float(x.sum()) for x in hidden}) == 6
