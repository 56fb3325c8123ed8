"""What every model keeps to, whatever its family."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from halvit_jax.models import create_model, list_models, vit
from halvit_jax.training.paths import flat, map_paths

CLASSES = 5
# Every family in a small shape: the ViTs narrow and shallow, the ResNets with one or two blocks a stage.
SMALL_VIT = {"width": 64, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}


def _small(name: str, **changes: Any) -> nn.Module:
    shape = SMALL_VIT if name in vit.SIZES else {"depths": (1, 1, 1, 2), "image_size": 32}
    return create_model(name, **({"num_classes": CLASSES} | shape | changes))


def _images(model: nn.Module, batch: int = 4) -> jax.Array:
    shape = (batch, model.image_size, model.image_size, 3)
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@functools.cache
def _variables(name: str) -> dict[str, Any]:
    """Random values of a plausible size, quicker to have than the model's own initial ones."""
    model = _small(name)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), _images(model), train=False))
    rng = np.random.default_rng(2)

    def value(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]) or 1)
        return jnp.asarray(1 + 0.1 * noise if path.endswith(("scale", "var")) else noise, leaf.dtype)

    return map_paths(value, shapes)


@pytest.mark.parametrize("name", list_models())
def test_logits_are_float32_finite_and_of_the_right_shape(name: str) -> None:
    model = _small(name)
    variables = _variables(name)
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, _images(model))
    assert logits.shape == (4, CLASSES)
    assert logits.dtype == jnp.float32
    assert bool(jnp.isfinite(logits).all())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", list_models())
def test_every_parameter_learns(name: str) -> None:
    model = _small(name)
    variables = _variables(name)
    images, state = _images(model), {k: v for k, v in variables.items() if k != "params"}
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((4, CLASSES)), jnp.float32)

    def loss(params: Any) -> jax.Array:
        logits, _ = model.apply({"params": params, **state}, images, train=True, mutable=list(state))
        return jnp.sum(weights * jax.nn.log_softmax(logits))

    grads = flat(jax.jit(jax.grad(loss))(variables["params"]))
    assert [path for path, grad in grads.items() if not bool(jnp.abs(grad).max() > 0)] == []


@pytest.mark.parametrize("name", list_models())
def test_bfloat16_computes_close_to_float32(name: str) -> None:
    model = _small(name)
    variables, images = _variables(name), _images(model)
    exact = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    rough = jax.jit(lambda v, x: _small(name, dtype="bfloat16").apply(v, x, train=False))(variables, images)
    assert rough.dtype == jnp.float32
    assert float(jnp.abs(rough - exact).max()) < 0.1 * float(exact.std()) + 0.02


@pytest.mark.parametrize("name", list_models())
def test_another_resolution_and_no_head(name: str) -> None:
    model = _small(name, image_size=48, num_classes=0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), _images(model), train=False))
    pooled = jax.eval_shape(lambda v: model.apply(v, _images(model), train=False), shapes)
    maps = jax.eval_shape(lambda v: model.apply(v, _images(model), train=False, method="features"), shapes)
    assert "head" not in shapes["params"]
    deepest = maps[max(maps)]
    assert pooled.shape == (4, deepest.shape[-1])
    for stride, feature in maps.items():
        assert feature.shape[:3] == (4, -(-48 // stride), -(-48 // stride))


@pytest.mark.parametrize("name", list_models())
def test_remat_changes_no_parameter_path(name: str) -> None:
    def paths(model: nn.Module) -> list[str]:
        return list(flat(jax.eval_shape(lambda: model.init(jax.random.key(0), _images(model), train=False))))

    assert paths(_small(name, remat=True)) == paths(_small(name))
