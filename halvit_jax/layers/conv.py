"""Convolution and pooling, channels last.

A convolution has two implementations, switched by `CONV_IMPLS`. Accelerators use XLA's own. XLA's CPU backend is fast
at matrix products and at ordinary convolutions, but slow (up to a hundred times, in the gradients) at 1x1, grouped and
depthwise ones and at the gradient of max-pooling. On a CPU those are products and sums of shifted views, with the same
number of multiplications and the same result up to float32 rounding.

Padding is a number of rows and columns on every side, as in PyTorch: with stride 2, XLA's "SAME" pads the far side only
and would shift the network by a pixel.

Shapes: `b` batch, `h w` space before, `u v` space after, `c` channels in, `f` channels out, `k` kernel side, `m` = buv,
`r` hidden channels of squeeze-excite.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

from halvit_jax.layers.arrays import align_last, wide_type
from halvit_jax.layers.batch_norm import BatchNorm
from halvit_jax.layers.initializers import Dtype, Initializer, torch_uniform, torch_uniform_bias


class Conv(nn.Module):
    """A convolution with a square kernel: [b, h, w, c] -> [b, u, v, f], u = (h + 2 * padding - k) // stride + 1.

    `padding=None` means k // 2. Raises ValueError unless `groups` divides both channel counts.
    """

    features: int  # f
    kernel_size: int = 1  # k
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    use_bias: bool = False
    kernel_init: Initializer = torch_uniform
    bias_init: Initializer | None = None  # None: PyTorch's default
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, k = x.shape[-1], self.kernel_size
        if channels % self.groups or self.features % self.groups:
            raise ValueError(
                f"groups={self.groups} of {self.name or 'Conv'} must divide its {channels} input channels and its "
                f"{self.features} features; change model.groups or the widths beside it"
            )
        shape = (k, k, channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init or torch_uniform_bias(k * k * shape[2]), (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = convolve(x, kernel, stride=self.stride, padding=self.padding, groups=self.groups)
        return y if bias is None else y + align_last(bias, y)


class ConvNorm(nn.Module):
    """A bias-free convolution and its batch normalisation, `conv` and `norm`: [b, h, w, c] -> [b, u, v, f].

    `folded`: the convolution alone, with a bias; see `batch_norm.fold`.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    kernel_init: Initializer = torch_uniform
    scale_init: Initializer = nn.initializers.ones
    dtype: Dtype = None
    folded: bool = False

    def setup(self) -> None:
        self.conv = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.padding,
            self.groups,
            use_bias=self.folded,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
        )
        self.norm = BatchNorm(scale_init=self.scale_init, dtype=self.dtype, folded="merged" if self.folded else "")

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.norm(self.conv(x), train=train)


class SqueezeExcite(nn.Module):
    """x * sigmoid(W2 relu(W1 mean(x) + b1) + b2): a weight for each channel (Hu et al., 2018, arXiv 1709.01507).

    [b, h, w, c] -> [b, h, w, c]. The mean is over space, in float32 at least.
    """

    hidden: int  # r
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(Conv, use_bias=True, dtype=self.dtype)
        y = x.mean((1, 2), keepdims=True, dtype=wide_type(x)).astype(x.dtype)  # [b, 1, 1, c]
        y = nn.relu(conv(self.hidden, name="reduce")(y))
        return x * nn.sigmoid(conv(x.shape[-1], name="expand")(y))


def convolve(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int | None = None, groups: int = 1
) -> jax.Array:
    """The convolution of x [b, h, w, c] with kernel [k, k, c / groups, f]: [b, u, v, f]. `padding=None`: k // 2."""
    padding = kernel.shape[0] // 2 if padding is None else padding
    convolution = CONV_IMPLS.get(jax.default_backend(), xla_convolution)
    return convolution(x, kernel, stride, padding, groups)


def xla_convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> jax.Array:
    """XLA's convolution, the right choice on TPU and GPU."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def matmul_convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> jax.Array:
    """The same sums as matrix products, for the convolutions that are slow in XLA's CPU backend."""
    k, channels, features = kernel.shape[0], x.shape[-1], kernel.shape[-1]
    if groups == 1 and k == 1 and padding == 0:
        return _pointwise(x[:, ::stride, ::stride], kernel[0, 0])
    if groups == 1:
        return xla_convolution(x, kernel, stride, padding, groups)
    if groups == channels == features:
        return _depthwise(x, kernel, stride, padding)
    return _grouped(x, kernel, stride, padding, groups)


# The implementation for each backend; the default is XLA's own convolution.
CONV_IMPLS: dict[str, Callable[..., jax.Array]] = {"cpu": matmul_convolution}


@contextlib.contextmanager
def xla_convolutions() -> Iterator[None]:
    """Use XLA's own convolution on every backend, so convolutions are counted as such.

    It affects tracing only, so trace fresh functions inside.
    """
    saved = dict(CONV_IMPLS)
    CONV_IMPLS.clear()
    try:
        yield
    finally:
        CONV_IMPLS.update(saved)


def depthwise_maps(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The depthwise convolution of maps, channels first, k odd: x [b, c, h, w], kernel [k, k, 1, c] -> [b, c, h, w].

    As `convolve` with c groups and k // 2 zeros around. Faster for a few channels of large maps, such as attention's,
    because the last axis is what is vectorised.
    """
    k, channels = kernel.shape[0], x.shape[1]
    if jax.default_backend() not in CONV_IMPLS:
        padding = [(k // 2, k // 2)] * 2
        numbers = ("NCHW", "HWIO", "NCHW")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=numbers, feature_group_count=channels
        )
    return _depthwise(x, kernel, 1, k // 2, first=2)


def max_pool(x: jax.Array, *, size: int, stride: int, padding: int) -> jax.Array:
    """The largest of each size x size window: [b, h, w, c] -> [b, u, v, c]. The first of equals takes the gradient."""
    if jax.default_backend() not in CONV_IMPLS:
        return nn.max_pool(x, (size, size), (stride, stride), [(padding, padding)] * 2)
    # Columns before rows, so that the first of equals is the first in reading order, as in PyTorch and XLA.
    for axis in (2, 1):
        x = functools.reduce(_first_max, _views(x, axis, size, stride, padding, -jnp.inf))
    return x


def _first_max(first: jax.Array, second: jax.Array) -> jax.Array:
    """The maximum, with the gradient to `first` when they are equal; NaN wins, as in lax.max."""
    return jnp.where((second > first) | jnp.isnan(second), second, first)


def _views(x: jax.Array, axis: int, size: int, stride: int, padding: int, fill: float) -> list[jax.Array]:
    """The first entries of all windows along `axis`, their second entries, ..."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (padding, padding)
    x = jnp.pad(x, widths, constant_values=fill)
    count = (x.shape[axis] - size) // stride + 1
    return [lax.slice_in_dim(x, i, i + (count - 1) * stride + 1, stride, axis) for i in range(size)]


@jax.custom_vjp
def _pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 1x1 convolution: x [b, u, v, c] @ kernel [c, f]."""
    return x @ kernel


def _pointwise_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _pointwise_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Differentiation gives the kernel's gradient as (grad.T @ x).T. XLA merges the transposition into the producer of
    # `grad`, which then writes against the order of memory. A product over the rows of both avoids that.
    x, kernel = saved
    rows = [a.reshape(-1, a.shape[-1]) for a in (x, grad)]  # [m, c], [m, f]
    return grad @ kernel.T, lax.dot_general(*rows, (((0,), (0,)), ((), ())))


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


def _depthwise(x: jax.Array, kernel: jax.Array, stride: int, padding: int, *, first: int = 1) -> jax.Array:
    """A depthwise convolution: per channel, the sum over the k * k places of a window of view times weight.

    `first` is the first axis of space: 1, or 2 with the channels before it.
    """
    k = kernel.shape[0]
    weights = kernel if first == 1 else kernel[..., None, None]  # [k, k, 1, c] or [k, k, 1, c, 1, 1]
    y = jnp.zeros((), wide_type(x))
    for i, rows in enumerate(_views(x, first, k, stride, padding, 0)):
        for j, view in enumerate(_views(rows, first + 1, k, stride, padding, 0)):
            y += view.astype(y.dtype) * align_last(weights[i, j, 0].astype(y.dtype), view)
    return y.astype(x.dtype)


def _grouped(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> jax.Array:
    """The sum over the k * k places of a window of one product per group, with the groups as a batch."""
    k, _, inside, features = kernel.shape
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, inside), -2, 0)  # [groups, b, h, w, c / groups]
    kernel = jnp.moveaxis(kernel.reshape(k, k, inside, groups, -1), -2, 2)  # [k, k, groups, c / groups, f / groups]
    y = jnp.zeros((), wide_type(x))
    for i, rows in enumerate(_views(x, 2, k, stride, padding, 0)):
        for j, view in enumerate(_views(rows, 3, k, stride, padding, 0)):
            y += jnp.einsum("gbuvc,gcf->gbuvf", view, kernel[i, j], preferred_element_type=y.dtype)
    return jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:-1], features).astype(x.dtype)
