from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from halvit_jax.layers import conv
from halvit_jax.layers.conv import Conv, ConvNorm, SqueezeExcite, convolve, max_pool, xla_convolution

C, F = 6, 12


def _random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _value_and_gradients(function: Callable, *args: jax.Array) -> list[jax.Array]:
    """The output, and the gradient of a random projection of it with respect to every argument."""

    def both(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        y, back = jax.vjp(function, *args)
        return y, back(_random(*y.shape, seed=9).astype(y.dtype))

    y, gradients = jax.jit(both)(*args)
    return [y, *gradients]


def _assert_same(ours: list[jax.Array], reference: list[jax.Array]) -> None:
    for a, b in zip(ours, reference, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("k", "stride", "padding", "groups", "features", "size"),
    [
        (1, 1, 0, 1, F, (9, 7)),
        (1, 2, 0, 1, F, (9, 7)),
        (1, 2, 0, 1, F, (8, 8)),
        (1, 1, 1, 1, F, (9, 7)),
        (3, 1, 1, 1, F, (9, 7)),
        (3, 2, 1, 1, F, (8, 8)),
        (7, 2, 3, 1, F, (9, 7)),
        (4, 4, 0, 1, F, (8, 8)),
        (3, 1, 1, C, C, (9, 7)),  # depthwise
        (3, 2, 1, C, C, (9, 7)),
        (3, 2, 1, C, C, (8, 8)),
        (7, 1, 3, C, C, (9, 7)),
        (3, 1, 1, C, F, (9, 7)),  # depthwise, two channels from each
        (3, 1, 1, 3, F, (9, 7)),  # grouped
        (3, 2, 1, 2, F, (8, 8)),
        (1, 1, 0, 2, F, (9, 7)),
    ],
)
def test_the_implementation_for_cpus_is_xlas_convolution(
    k: int, stride: int, padding: int, groups: int, features: int, size: tuple[int, int]
) -> None:
    x, kernel = _random(2, *size, C), _random(k, k, C // groups, features, seed=1)
    ours = _value_and_gradients(lambda x, w: convolve(x, w, stride=stride, padding=padding, groups=groups), x, kernel)
    reference = _value_and_gradients(lambda x, w: xla_convolution(x, w, stride, padding, groups), x, kernel)
    _assert_same(ours, reference)


@pytest.mark.parametrize(("k", "groups", "features"), [(1, 1, F), (3, 1, F), (3, C, C), (3, 2, F)])
def test_bfloat16_adds_up_in_float32(k: int, groups: int, features: int) -> None:
    x, kernel = _random(2, 9, 9, C), _random(k, k, C // groups, features, seed=1)
    convolved = jax.jit(lambda x, kernel: convolve(x, kernel, groups=groups))
    exact = convolved(x, kernel)
    rounded = convolved(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    assert float(jnp.abs(rounded.astype(jnp.float32) - exact).max() / exact.std()) < 0.03


def test_padding_is_symmetric_unless_given() -> None:
    x, kernel = _random(1, 8, 8, C), _random(3, 3, C, F)
    np.testing.assert_array_equal(convolve(x, kernel, stride=2), convolve(x, kernel, stride=2, padding=1))
    assert convolve(x, kernel, padding=0).shape == (1, 6, 6, F)


@pytest.mark.parametrize(("k", "groups", "features"), [(1, 1, F), (3, C, C), (3, 2, F)])
def test_one_switch_gives_accelerators_xlas_convolution(
    monkeypatch: pytest.MonkeyPatch, k: int, groups: int, features: int
) -> None:
    x, kernel = _random(1, 8, 8, C), _random(k, k, C // groups, features)

    def program() -> str:
        return str(
            jax.make_jaxpr(lambda x, w: max_pool(convolve(x, w, groups=groups), size=3, stride=2, padding=1))(x, kernel)
        )

    assert "conv_general_dilated" not in program()
    assert "reduce_window" not in program()
    with conv.xla_convolutions():
        assert program().count("conv_general_dilated[") == 1
    assert "conv_general_dilated" not in program()
    monkeypatch.delitem(conv.CONV_IMPLS, "cpu")
    assert program().count("conv_general_dilated[") == 1
    assert "reduce_window" in program()


@pytest.mark.parametrize("k", [3, 5])
def test_depthwise_maps_are_the_convolution_of_each_channel_with_the_channels_first(k: int) -> None:
    x, kernel = _random(2, C, 9, 7), _random(k, k, 1, C, seed=1)
    ours = _value_and_gradients(lambda x, w: conv.depthwise_maps(x, w), x, kernel)
    with conv.xla_convolutions():
        native = _value_and_gradients(lambda x, w: conv.depthwise_maps(x, w), x, kernel)

    def channels_last(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return xla_convolution(x.transpose(0, 2, 3, 1), kernel, 1, k // 2, C).transpose(0, 3, 1, 2)

    reference = _value_and_gradients(channels_last, x, kernel)
    _assert_same(ours, reference)
    _assert_same(native, reference)
    rough = conv.depthwise_maps(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16
    assert float(jnp.abs(rough.astype(jnp.float32) - ours[0]).max() / ours[0].std()) < 0.03


def test_the_one_switch_is_that_of_depthwise_maps_too() -> None:
    def program() -> str:
        return str(jax.make_jaxpr(lambda x, w: conv.depthwise_maps(x, w))(_random(1, C, 5, 4), _random(3, 3, 1, C)))

    assert "conv_general_dilated" not in program()
    with conv.xla_convolutions():
        assert program().count("conv_general_dilated[") == 1


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_max_pool_is_xlas_also_where_values_are_equal(size: tuple[int, int]) -> None:
    x = jnp.round(_random(2, *size, C))  # whole numbers: nearly every window has equals
    ours = _value_and_gradients(lambda x: max_pool(x, size=3, stride=2, padding=1), x)
    reference = _value_and_gradients(lambda x: nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)]), x)
    _assert_same(ours, reference)


def test_max_pool_propagates_nan() -> None:
    x = _random(1, 6, 6, 1).at[0, 2, 3, 0].set(jnp.nan)
    ours = max_pool(x, size=3, stride=2, padding=1)
    reference = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
    assert int(jnp.isnan(ours).sum()) > 0
    np.testing.assert_array_equal(ours, reference)


def test_conv_has_a_kernel_and_a_bias_when_asked() -> None:
    x = _random(2, 8, 8, C)
    layer = Conv(F, 4, 4, padding=0, use_bias=True)  # a patch embedding
    variables = layer.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"kernel": (4, 4, C, F), "bias": (F,)}
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    bound = (4 * 4 * C) ** -0.5
    assert float(jnp.abs(kernel).max()) <= bound
    assert 0 < float(jnp.abs(bias).max()) <= bound
    expected = np.einsum("buivjc,ijcf->buvf", np.asarray(x).reshape(2, 2, 4, 2, 4, C), kernel) + np.asarray(bias)
    np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-5)


@pytest.mark.parametrize(("groups", "features"), [(4, 12), (3, 10)])
def test_groups_must_divide_the_channels_on_both_sides(groups: int, features: int) -> None:
    with pytest.raises(ValueError, match=rf"groups={groups} .* 6 input channels .* {features} features; change model"):
        Conv(features, 3, groups=groups).init(jax.random.key(0), _random(1, 4, 4, C))


def test_conv_norm_is_a_convolution_then_its_norm() -> None:
    x = _random(2, 8, 8, C)
    layer = ConvNorm(F, 3, 2, groups=2, scale_init=nn.initializers.zeros)
    variables = layer.init(jax.random.key(0), x, train=False)
    assert jax.tree.map(jnp.shape, variables) == {
        "params": {"conv": {"kernel": (3, 3, C // 2, F)}, "norm": {"scale": (F,), "bias": (F,)}},
        "batch_stats": {"norm": {"mean": (F,), "var": (F,)}},
    }
    y = layer.apply(variables, x, train=False)
    assert y.shape == (2, 4, 4, F)
    assert not y.any()  # scale starts at what `scale_init` says


def test_the_implementations_come_back_after_an_error() -> None:
    before = dict(conv.CONV_IMPLS)
    with pytest.raises(KeyError), conv.xla_convolutions():
        raise KeyError
    assert before == conv.CONV_IMPLS


def test_squeeze_excite_weighs_channels_by_their_means() -> None:
    x = _random(2, 5, 4, C)
    layer = conv.SqueezeExcite(3)
    variables = layer.init(jax.random.key(0), x)
    params = jax.tree.map(np.asarray, variables["params"])
    reduce, expand = params["reduce"], params["expand"]
    assert (reduce["kernel"].shape, expand["kernel"].shape) == ((1, 1, C, 3), (1, 1, 3, C))
    hidden = np.maximum(np.asarray(x).mean((1, 2)) @ reduce["kernel"][0, 0] + reduce["bias"], 0)
    weights = 1 / (1 + np.exp(-(hidden @ expand["kernel"][0, 0] + expand["bias"])))
    np.testing.assert_allclose(layer.apply(variables, x), np.asarray(x) * weights[:, None, None], rtol=1e-5)


def test_squeeze_excite_averages_in_float32() -> None:
    # A bfloat16 sum of 4096 ones stops at 256.
    x = jnp.ones((1, 64, 64, C), jnp.bfloat16)
    layer = SqueezeExcite(3, dtype=jnp.bfloat16)
    variables = SqueezeExcite(3).init(jax.random.key(0), x.astype(jnp.float32))
    exact = SqueezeExcite(3).apply(variables, x.astype(jnp.float32))
    y = layer.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0.02)
