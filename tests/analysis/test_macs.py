from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from halvit_jax.analysis.macs import count_macs
from halvit_jax.layers.fused_ffn import ffn_over_rows
from halvit_jax.training.sharding import make_mesh


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize(
    ("function", "shapes", "macs"),
    [
        (jnp.matmul, [(5, 7), (7, 3)], 5 * 7 * 3),
        (jnp.matmul, [(2, 4, 5, 7), (7, 3)], 2 * 4 * 5 * 7 * 3),
        (lambda q, k: jnp.einsum("bqhk,bnhk->bhqn", q, k), [(2, 5, 3, 4), (2, 6, 3, 4)], 2 * 3 * 5 * 6 * 4),
        (lambda x, y: jnp.einsum("abc,abc->", x, y), [(2, 3, 4), (2, 3, 4)], 2 * 3 * 4),
        (lambda x, y: jnp.sin(x + y) / x.mean(), [(9, 9), (9, 9)], 0),
    ],
)
def test_products_cost_a_multiplication_for_every_summand(
    function: Callable[..., Any], shapes: list[tuple[int, ...]], macs: int
) -> None:
    assert count_macs(function, *(_array(*shape) for shape in shapes)) == macs


@pytest.mark.parametrize(
    ("kernel", "stride", "groups", "macs"),
    [
        ((3, 3, 8, 16), 1, 1, 2 * 6 * 6 * 16 * 9 * 8),
        ((3, 3, 8, 16), 2, 1, 2 * 3 * 3 * 16 * 9 * 8),
        ((3, 3, 2, 16), 1, 4, 2 * 6 * 6 * 16 * 9 * 2),
        ((3, 3, 1, 8), 1, 8, 2 * 6 * 6 * 8 * 9),
        ((1, 1, 8, 16), 1, 1, 2 * 8 * 8 * 16 * 8),
    ],
    ids=["dense", "strided", "grouped", "depthwise", "pointwise"],
)
def test_convolutions_cost_a_kernel_for_every_output(
    kernel: tuple[int, ...], stride: int, groups: int, macs: int
) -> None:
    counted = count_macs(lambda x, k: _convolve(x, k, stride, groups), _array(2, 8, 8, 8), _array(*kernel))
    assert counted == macs


def test_a_convolution_costs_the_same_in_another_layout() -> None:
    def channels_first(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv(x, kernel, (1, 1), "VALID")

    assert count_macs(channels_first, _array(2, 8, 8, 8), _array(16, 8, 3, 3)) == 2 * 6 * 6 * 16 * 9 * 8


def _custom(x: jax.Array) -> jax.Array:
    product = jax.custom_vjp(lambda x: x @ x)
    product.defvjp(lambda x: (x @ x, x), lambda x, grad: (grad @ x.T,))
    return product(x)


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (jax.jit(lambda x: jax.jit(jnp.matmul)(x, x) @ x), 2),
        (jax.checkpoint(lambda x: x @ x), 1),
        (_custom, 1),
        (lambda x: jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=7)[0], 7),
        (
            lambda x: jax.lax.scan(
                lambda c, _: (jax.lax.scan(lambda d, _: (d @ x, 0), c, length=3)[0], 0), x, length=2
            ),
            6,
        ),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x), 2),
        (lambda x: jax.lax.switch(0, [lambda: x, lambda: x @ x, lambda: x @ x @ x @ x]), 3),
        (lambda x: jax.vmap(lambda row: row @ x)(x), 1),
        (jax.grad(lambda x: jnp.sum((x @ jnp.ones((4, 4))) ** 2)), 2),
    ],
    ids=["jit", "checkpoint", "custom_vjp", "scan", "nested scan", "cond", "switch", "vmap", "grad"],
)
def test_products_inside_transformations_count(function: Callable[..., Any], products: int) -> None:
    assert count_macs(function, _array(4, 4)) == products * 4**3


def test_arrays_and_trees_count_like_shapes() -> None:
    tree = {"w": jnp.ones((7, 3))}
    assert count_macs(lambda tree, x: x @ tree["w"], tree, jnp.ones((5, 7))) == 5 * 7 * 3


@pytest.mark.parametrize("devices", [1, 8])
def test_kernels_count_for_every_step_of_their_grid_and_every_device(devices: int) -> None:
    b, n, d, f = 16, 5, 8, 12
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((b, n, d), (d, f), (f,), (d,))]

    def layer(x: jax.Array, w: jax.Array, b1: jax.Array, b2: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(make_mesh(devices=jax.devices()[:devices]).abstract_mesh):
            return ffn_over_rows(x, (w,), (b1, b2))

    assert count_macs(layer, *shapes) == 2 * b * n * d * f
