"""What every model keeps to, whatever its family."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.shapes import random_variables
from helpers.tiers import CORE, KINDS, tiered

from halvit_jax.layers import conv
from halvit_jax.models import MODELS, create_model, list_models
from halvit_jax.models.minivit import MiniDeit, MiniSwin
from halvit_jax.models.nextvit import NextViT
from halvit_jax.models.pvt import PVT, PVTv2
from halvit_jax.models.regnet import RegNet
from halvit_jax.models.resnet import ResNet
from halvit_jax.models.shvit import SHViT
from halvit_jax.models.swin import SwinTransformer
from halvit_jax.models.vit import VisionTransformer
from halvit_jax.trees import flatten, variable_shapes

CLASSES = 5
# Every family in a small shape that still has one block of each kind, and two that share what a stage shares.
VIT = {"width": 64, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
SWIN = {"width": 32, "depths": (2, 2), "head_width": 16, "window_size": 4, "image_size": 32}
PYRAMID = {
    "strides": (4, 2),
    "widths": (16, 24),
    "depths": (1, 1),
    "head_width": 8,
    "ffn_ratios": (2, 2),
    "reductions": (2, 1),
    "image_size": 32,
}
SMALL: dict[type[nn.Module], dict[str, Any]] = {
    VisionTransformer: VIT,
    PVT: PYRAMID,
    PVTv2: PYRAMID | {"strides": (4,), "widths": (16,), "depths": (1,), "ffn_ratios": (2,), "reductions": (2,)},
    RegNet: {"depths": (1, 1, 2, 1), "widths": (16, 24, 32, 48), "group_width": 8, "image_size": 32},
    ResNet: {"depths": (1, 1, 2, 1), "image_size": 32},
    SHViT: {
        "depths": (1, 1),
        "widths": (16, 24),
        "partial": (8, 8),
        "stages": ("i", "s"),
        "stem_strides": (2, 2),
        "image_size": 32,
    },
    SwinTransformer: SWIN,
    NextViT: {
        "depths": (1, 2),
        "widths": (16, 24),
        "periods": (0, 2),
        "reductions": (1, 2),
        "stem_widths": (8, 16),
        "stem_strides": (2, 2),
        "head_width": 8,
        "image_size": 32,
    },
    MiniDeit: VIT,
    MiniSwin: SWIN | {"shares": (2, 2)},
}


def _small(name: str, **changes: Any) -> nn.Module:
    family, _ = MODELS[name]
    return create_model(name, **({"num_classes": CLASSES} | SMALL[family] | changes))


def _images(model: nn.Module) -> jax.Array:
    shape = (4, model.image_size, model.image_size, 3)
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


# What follows is kept for each small model, for sizes of one family often have the same one.


_shapes = functools.cache(variable_shapes)
_variables = functools.cache(random_variables)


@functools.cache
def _logits(model: nn.Module) -> jax.Array:
    variables = _variables(model.clone(dtype="float32"))
    with conv.native():
        return jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, _images(model))


@functools.cache
def _gradients(model: nn.Module) -> dict[str, jax.Array]:
    params, images = _variables(model)["params"], _images(model)
    state = {collection: tree for collection, tree in _variables(model).items() if collection != "params"}
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((4, CLASSES)), jnp.float32)

    @jax.jit
    @jax.grad
    def gradient(params: Any) -> jax.Array:
        logits, _ = model.apply({"params": params, **state}, images, train=True, mutable=list(state))
        return jnp.sum(weights * jax.nn.log_softmax(logits))

    with conv.native():  # quicker to compile; tests/layers/test_conv.py holds the formulations to each other
        return flatten(gradient(params))


@pytest.mark.parametrize("name", tiered(list_models(), KINDS))
def test_logits_are_float32_finite_and_of_the_right_shape(name: str) -> None:
    logits = _logits(_small(name, dtype="float32"))
    assert (logits.shape, logits.dtype) == ((4, CLASSES), jnp.float32)
    assert bool(jnp.isfinite(logits).all())


@pytest.mark.parametrize("name", tiered(list_models(), KINDS))
def test_variables_are_float32_whatever_is_computed_in(name: str) -> None:
    for dtype in ("float32", "bfloat16"):
        assert {leaf.dtype for leaf in jax.tree.leaves(_shapes(_small(name, dtype=dtype)))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", tiered(list_models(), CORE))
def test_every_parameter_learns(name: str) -> None:
    model = _small(name, dtype="float32")
    grads = _gradients(model)
    assert grads.keys() == flatten(_variables(model)["params"]).keys()
    assert [path for path, grad in grads.items() if not 0 < float(jnp.abs(grad).max()) < np.inf] == []


@pytest.mark.parametrize("name", tiered(list_models(), CORE))
def test_bfloat16_computes_close_to_float32(name: str) -> None:
    exact, rough = (_logits(_small(name, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert rough.dtype == jnp.float32
    assert 0 < float(jnp.abs(rough - exact).max()) < 0.1 * float(exact.std())


@pytest.mark.parametrize("name", tiered(list_models(), KINDS))
def test_another_resolution_and_no_head(name: str) -> None:
    model = _small(name, image_size=48, num_classes=0)
    shapes = _shapes(model)
    pooled = jax.eval_shape(lambda v: model.apply(v, _images(model), train=False), shapes)
    maps = jax.eval_shape(lambda v: model.apply(v, _images(model), train=False, method="features"), shapes)
    assert "head" not in shapes["params"]
    assert (pooled.shape, pooled.dtype) == ((4, maps[max(maps)].shape[-1]), jnp.float32)
    for stride, feature in maps.items():
        assert feature.shape[:3] == (4, math.ceil(48 / stride), math.ceil(48 / stride))


@pytest.mark.parametrize("name", tiered(list_models(), KINDS))
def test_remat_changes_no_parameter_path(name: str) -> None:
    assert list(flatten(_shapes(_small(name, remat=True)))) == list(flatten(_shapes(_small(name))))
