"""What every model keeps to, whatever its family: checks of a model by name, in the tiny shape of its family."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from helpers.shapes import random_variables

from halvit_jax.layers import conv
from halvit_jax.models import create_model, family_of, partition_rules, transfer_rules
from halvit_jax.models.intermediates import capture
from halvit_jax.trees import count, first_match, flatten, variable_shapes

CLASSES = 5
shapes_of = functools.cache(variable_shapes)  # for sizes of one family often have the same tiny shape
variables_of = functools.cache(random_variables)


def tiny_model(name: str, **changes: Any) -> nn.Module:
    """The model in the tiny shape of its family."""
    return create_model(name, **({"num_classes": CLASSES} | family_of(name).tiny | changes))


def images_of(model: nn.Module, height: int = 0, width: int = 0) -> jax.Array:
    """Four images of noise, of the model's own size or of another."""
    shape = (4, height or model.image_size, width or model.image_size, 3)
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@functools.cache
def logits_of(model: nn.Module) -> jax.Array:
    """The logits of four images, with the variables of the model in float32."""
    variables = variables_of(model.clone(dtype="float32"))
    with conv.xla_convolutions():  # quicker to compile; tests/layers/test_conv.py compares the implementations
        return jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images_of(model))


def check_logits_are_float32_and_finite(name: str) -> None:
    """Also of the right shape."""
    logits = logits_of(tiny_model(name, dtype="float32"))
    assert (logits.shape, logits.dtype) == ((4, CLASSES), jnp.float32)
    assert bool(jnp.isfinite(logits).all())


def check_variables_are_float32_in_any_compute_dtype(name: str) -> None:
    """Parameters and statistics alike."""
    for dtype in ("float32", "bfloat16"):
        leaves = jax.tree.leaves(shapes_of(tiny_model(name, dtype=dtype)))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def check_images_of_other_channels_change_the_first_kernel_alone(name: str) -> None:
    """Of five spectral bands."""
    colour, found = (
        {path: leaf.shape for path, leaf in flatten(shapes_of(tiny_model(name, dtype="float32", **changes))).items()}
        for changes in ({}, {"in_channels": 5})
    )
    assert found.keys() == colour.keys()
    (kernel,) = (path for path, shape in found.items() if shape != colour[path])
    assert (colour[kernel][2], found[kernel][2], len(found[kernel])) == (3, 5, 4)
    assert first_match(kernel.split("/", 1)[1], transfer_rules(tiny_model(name))) == "input_channels"


def check_every_parameter_learns(name: str) -> None:
    """Each gets a gradient that is finite and not 0."""
    model = tiny_model(name, dtype="float32")
    state = {collection: tree for collection, tree in variables_of(model).items() if collection != "params"}
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((4, CLASSES)), jnp.float32)

    @jax.jit
    @jax.grad
    def gradient(params: Any) -> jax.Array:
        logits, _ = model.apply({"params": params, **state}, images_of(model), train=True, mutable=list(state))
        return jnp.sum(weights * jax.nn.log_softmax(logits))

    with conv.xla_convolutions():
        grads = flatten(gradient(variables_of(model)["params"]))
    assert grads.keys() == flatten(variables_of(model)["params"]).keys()
    assert [path for path, grad in grads.items() if not 0 < float(jnp.abs(grad).max()) < np.inf] == []


def check_bfloat16_is_close_to_float32(name: str) -> None:
    """And not the same; the logits are not rounded to bfloat16."""
    exact, rough = (logits_of(tiny_model(name, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert rough.dtype == jnp.float32
    assert bool((rough != rough.astype(jnp.bfloat16).astype(jnp.float32)).any())
    assert 0 < float(jnp.abs(rough - exact).max()) < 0.1 * float(exact.std())


def check_the_residual_is_float32_where_the_field_says_so(name: str) -> None:
    """The outputs of all blocks, while the branches compute in bfloat16."""
    for wide, dtype in ((True, jnp.float32), (False, jnp.bfloat16), (None, jnp.bfloat16)):
        model = tiny_model(name, dtype="bfloat16", **{} if wide is None else {"residual_float32": wide})
        blocks = jax.eval_shape(lambda v: capture(model, v, images_of(model), ("blocks",)), variables_of(model))  # noqa: B023
        leaves = jax.tree.leaves(blocks)
        assert leaves
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}


def check_a_float32_residual_is_closer_to_float32(name: str, size: int) -> None:
    """The RMS error of the logits in bfloat16, of the whole depth with weights of twice their initial size."""
    exact = create_model(name, image_size=size)
    variables = jax.jit(lambda: exact.init(jax.random.key(0), images_of(exact), train=False))()
    variables = jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim > 1 else leaf, variables)
    logits = jax.jit(lambda v: exact.apply(v, images_of(exact), train=False))(variables)
    errors = []
    for wide in (False, True):
        model = create_model(name, image_size=size, dtype="bfloat16", residual_float32=wide)
        rough = jax.jit(lambda v, model=model: model.apply(v, images_of(model), train=False))(variables)
        errors.append(float(jnp.sqrt(jnp.mean((rough - logits) ** 2)) / logits.std()))
    print(f"{name}: {errors[0]:.4f}, {errors[1]:.4f}")
    assert errors[1] < 0.9 * errors[0] < 0.02


def check_another_resolution_and_no_head(name: str) -> None:
    """`image_size` rebuilds the model, `num_classes=0` leaves pooled features."""
    model = tiny_model(name, image_size=48, num_classes=0)
    shapes = shapes_of(model)
    pooled = jax.eval_shape(lambda v: model.apply(v, images_of(model), train=False), shapes)
    maps = jax.eval_shape(lambda v: model.apply(v, images_of(model), train=False, method="features"), shapes)
    assert "head" not in shapes["params"]
    assert (pooled.shape, pooled.dtype) == ((4, maps[max(maps)].shape[-1]), jnp.float32)
    for stride, feature in maps.items():
        assert feature.shape[:3] == (4, math.ceil(48 / stride), math.ceil(48 / stride))


def check_features_of_rectangles(name: str) -> None:
    """Of any sides that the strides divide: maps of every stride, finite, and transposed images give other maps."""
    model = tiny_model(name, dtype="float32")
    variables, largest = variables_of(model), max(_strides(model))
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False, method="features"))
    for height, width in ((2 * largest, 3 * largest), (3 * largest, 2 * largest)):
        with conv.xla_convolutions():
            maps = apply(variables, images_of(model, height, width))
        assert sorted(maps) == sorted(_strides(model))
        for stride, feature in maps.items():
            assert feature.shape[:3] == (4, height // stride, width // stride)
            assert bool(jnp.isfinite(feature).all())


def check_frozen_norms_keep_their_averages(name: str) -> None:
    """`frozen_norms` gives in training the maps of evaluation, and leaves the statistics as they are."""
    model = tiny_model(name, dtype="float32")
    variables = variables_of(model)
    state = [collection for collection in variables if collection != "params"]

    @functools.partial(jax.jit, static_argnames=("train", "frozen"))
    def apply(variables: Any, train: bool, frozen: bool) -> Any:
        arguments = {"train": train, "frozen_norms": frozen, "mutable": state, "method": "features"}
        return model.apply(variables, images_of(model), **arguments)

    with conv.xla_convolutions():
        evaluated, _ = apply(variables, train=False, frozen=False)
        frozen, kept = apply(variables, train=True, frozen=True)
    for path, feature in flatten(evaluated).items():
        np.testing.assert_allclose(flatten(frozen)[path], feature, rtol=1e-5, atol=1e-5)
    for path, array in flatten(kept).items():
        np.testing.assert_array_equal(array, flatten({name: variables[name] for name in state})[path])


def check_remat_changes_no_parameter_path(name: str) -> None:
    """A checkpoint of one is one of the other."""
    assert list(flatten(shapes_of(tiny_model(name, remat=True)))) == list(flatten(shapes_of(tiny_model(name))))


def check_every_parameter_has_a_partition_rule(name: str) -> None:
    """Of no more entries than the array has dimensions."""
    model = tiny_model(name)
    for path, leaf in flatten(shapes_of(model)["params"]).items():
        assert len(first_match(path, partition_rules(model))) <= len(leaf.shape), path


def check_blocks_can_be_captured(name: str) -> None:
    """`capture` finds every block's output."""
    model = tiny_model(name, dtype="float32")
    found = jax.eval_shape(lambda v: capture(model, v, images_of(model), ("blocks",)), shapes_of(model))["blocks"]
    assert found
    assert all(array.shape[0] == 4 for array in found.values())


def check_fold_keeps_the_logits(name: str) -> None:
    """With fewer parameters, where there are batch normalisations."""
    from halvit_jax.models import fold

    model = tiny_model(name, dtype="float32")
    variables = variables_of(model)
    folded, fewer = fold(model, variables)
    assert (folded is model) == ("batch_stats" not in variables)
    assert count(fewer) <= count(variables)
    with conv.xla_convolutions():
        logits = jax.jit(lambda v, x: folded.apply(v, x, train=False))(fewer, images_of(model))
    np.testing.assert_allclose(logits, logits_of(model), rtol=1e-3, atol=1e-4 * float(jnp.abs(logits_of(model)).max()))


def _strides(model: nn.Module) -> list[int]:
    """The strides of the maps of `features`."""
    images = images_of(model)
    return list(jax.eval_shape(lambda v: model.apply(v, images, train=False, method="features"), shapes_of(model)))


CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_logits_are_float32_and_finite,
        check_variables_are_float32_in_any_compute_dtype,
        check_every_parameter_learns,
        check_bfloat16_is_close_to_float32,
        check_another_resolution_and_no_head,
        check_features_of_rectangles,
        check_frozen_norms_keep_their_averages,
        check_remat_changes_no_parameter_path,
        check_every_parameter_has_a_partition_rule,
        check_blocks_can_be_captured,
        check_fold_keeps_the_logits,
    )
}
