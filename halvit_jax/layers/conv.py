"""Convolution, batch normalisation and pooling, channels last.

Two formulations of a convolution stand side by side. Accelerators get XLA's own convolution. XLA's CPU backend is quick at
matrix products and slow at most else a convolution network needs, so there `convolve`, `max_pool` and their gradients are
written as products, sums and shifted views: the same maths, agreeing to float32 rounding, with no more multiplications.
`FORMULATIONS` is the one switch.

Padding is always given as a number of rows and columns on every side, as in PyTorch; with stride 2 XLA's "SAME" pads
otherwise and would shift the network by a pixel.

Shapes: `b` batch, `h w` space before, `u v` space after, `c` channels in, `f` channels out, `k` kernel side, `m` = b*u*v.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

from halvit_jax.layers.init import Dtype, Initializer, torch_uniform, torch_uniform_bias


class Conv(nn.Module):
    """A convolution with a square kernel: [b, h, w, c] -> [b, u, v, f], u = (h + 2 * padding - k) // stride + 1.

    `padding=None` stands for k // 2. Raises ValueError when `groups` divides not both channel counts.
    """

    features: int  # f
    kernel_size: int = 1  # k
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    use_bias: bool = False
    kernel_init: Initializer = torch_uniform
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, k = x.shape[-1], self.kernel_size
        if channels % self.groups or self.features % self.groups:
            raise ValueError(
                f"groups={self.groups} of {self.name or 'Conv'} must divide both its {channels} input channels and its "
                f"{self.features} features; change model.groups or the widths beside it"
            )
        shape = (k, k, channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", torch_uniform_bias(k * k * shape[2]), (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = convolve(x, kernel, stride=self.stride, padding=self.padding, groups=self.groups)
        return y if bias is None else y + bias


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's bookkeeping: [..., c] -> [..., c].

    Statistics are float32 whatever the type computed in. Training normalises with the biased variance of the batch (of
    the whole batch also when it is sharded) and moves the averages in `batch_stats` towards its mean and its *unbiased*
    variance, as PyTorch does; evaluation normalises with the averages. `momentum` is the weight of the old average.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Initializer = nn.initializers.ones
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        features = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_var = self.variable("batch_stats", "var", jnp.ones, features)

        wide = x.astype(jnp.float32)
        if train:
            axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
            mean = wide.mean(axes)
            var = jnp.maximum((wide * wide).mean(axes) - mean * mean, 0)
            if not self.is_initializing():
                move = functools.partial(_moving_average, self.momentum)
                running_mean.value = move(running_mean.value, mean)
                running_var.value = move(running_var.value, var * (count / max(count - 1, 1)))
        else:
            mean, var = running_mean.value, running_var.value
        # One multiply and one add per element, both here and in the gradient that differentiation makes of it.
        factor = scale * lax.rsqrt(var + self.epsilon)
        return (wide * factor + (bias - mean * factor)).astype(self.dtype or x.dtype)


class ConvNorm(nn.Module):
    """A bias-free convolution and its batch normalisation, `conv` and `norm`: [b, h, w, c] -> [b, u, v, f]."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    kernel_init: Initializer = torch_uniform
    scale_init: Initializer = nn.initializers.ones
    dtype: Dtype = None

    def setup(self) -> None:
        self.conv = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.padding,
            self.groups,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
        )
        self.norm = BatchNorm(scale_init=self.scale_init, dtype=self.dtype)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.norm(self.conv(x), train=train)


def convolve(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int | None = None, groups: int = 1
) -> jax.Array:
    """The convolution of x [b, h, w, c] with kernel [k, k, c / groups, f]: [b, u, v, f]. `padding=None`: k // 2."""
    padding = kernel.shape[0] // 2 if padding is None else padding
    formulation = FORMULATIONS.get(jax.default_backend(), native_convolution)
    return formulation(x, kernel, stride, padding, groups)


def native_convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> jax.Array:
    """XLA's convolution, the right choice on TPU and GPU."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def matrix_convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> jax.Array:
    """The same sums as matrix products, where those are faster on a CPU than the convolution."""
    k = kernel.shape[0]
    if groups > 1:
        return native_convolution(x, kernel, stride, padding, groups)
    if k == 1 and padding == 0:
        return _pointwise(x[:, ::stride, ::stride], kernel)
    return _dense(x, kernel, stride, padding)


# The formulation for each backend; XLA's own convolution where none is named.
FORMULATIONS: dict[str, Callable[..., jax.Array]] = {"cpu": matrix_convolution}


def max_pool(x: jax.Array, *, size: int, stride: int, padding: int) -> jax.Array:
    """The largest of each size x size window: [b, h, w, c] -> [b, u, v, c]. The first of equals takes the gradient."""
    if jax.default_backend() not in FORMULATIONS:
        return nn.max_pool(x, (size, size), (stride, stride), [(padding, padding)] * 2)
    # Rows of the window's columns first: the first row that holds the maximum, in it the first column.
    for axis in (2, 1):
        x = functools.reduce(_first_max, _window_views(x, axis, size, stride, padding, -jnp.inf))
    return x


def _moving_average(momentum: float, old: jax.Array, new: jax.Array) -> jax.Array:
    return momentum * old + (1 - momentum) * lax.stop_gradient(new)


def _first_max(a: jax.Array, b: jax.Array) -> jax.Array:
    """max(a, b) whose gradient goes to `a` when they are equal; not-a-number wins, as in lax.max."""
    return jnp.where((b > a) | jnp.isnan(b), b, a)


def _window_views(x: jax.Array, axis: int, size: int, stride: int, padding: int, fill: float) -> list[jax.Array]:
    """For each place in a window along `axis`, what every window holds there."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (padding, padding)
    x = jnp.pad(x, widths, constant_values=fill)
    count = (x.shape[axis] - size) // stride + 1
    return [lax.slice_in_dim(x, i, i + (count - 1) * stride + 1, stride, axis) for i in range(size)]


@jax.custom_vjp
def _pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 1x1 convolution: [b, h, w, c] x [1, 1, c, f] -> [b, h, w, f]."""
    return x @ kernel[0, 0]


def _pointwise_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _pointwise(x, kernel), (x, kernel)


def _pointwise_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    grad = lax.optimization_barrier(grad)
    return grad @ kernel[0, 0].T, _rows_product(_rows(x), _rows(grad))[None, None]


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    return native_convolution(x, kernel, stride, padding, 1)


def _dense_forward(x, kernel, stride, padding):
    return _dense(x, kernel, stride, padding), (x, kernel)


def _dense_backward(stride, padding, saved, grad):
    x, kernel = saved
    grad = lax.optimization_barrier(grad)
    _, back = jax.vjp(lambda x, kernel: native_convolution(x, kernel, stride, padding, 1), x, kernel)
    return back(grad)


_dense.defvjp(_dense_forward, _dense_backward)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])  # [m, c]


def _rows_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x.T @ y of x [m, c] and y [m, f] with m large, transposing the narrower of the two.

    The barriers keep the transposition a copy of its own: fused into whatever made the array, it would be computed
    again, element by element, in the wrong order for the cache.
    """
    if x.shape[1] > y.shape[1]:
        return lax.optimization_barrier(_rows_product(y, x)).T
    return lax.optimization_barrier(lax.optimization_barrier(x).T) @ y
