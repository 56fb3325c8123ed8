"""Residual blocks of ResNets: basic, bottleneck, and the bottleneck around a tied kernel.

Shapes: `b` batch, `h w` space, `c` channels; `out` channels after a block, `width` inside a bottleneck.
"""

import functools

import jax
from flax import linen as nn

from halvit_jax.layers.batch_norm import BatchNorm
from halvit_jax.layers.conv import Conv, ConvNorm
from halvit_jax.layers.drop import DropPath
from halvit_jax.layers.initializers import Dtype, Initializer
from halvit_jax.layers.tied import TiedDense


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [b, h, w, c] -> [b, h/stride, w/stride, out]."""

    out: int
    stride: int
    drop_path: float
    kernel_init: Initializer
    dtype: Dtype
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        common = {"kernel_init": self.kernel_init, "dtype": self.dtype}
        conv = functools.partial(Conv, use_bias=self.folded, **common)
        norm = functools.partial(BatchNorm, dtype=self.dtype, folded="merged" if self.folded else "")
        y = conv(self.out, 3, self.stride, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y, train=train))
        y = conv(self.out, 3, name="conv2")(y)
        y = norm(name="norm2")(y, train=train)
        if x.shape != y.shape:
            x = ConvNorm(self.out, 1, self.stride, **common, folded=self.folded, name="shortcut")(x, train=train)
        return nn.relu(DropPath(self.drop_path, name="drop_path")(y, train=train) + x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: [b, h, w, c] -> [b, h/stride, w/stride, out]."""

    out: int
    width: int
    stride: int
    drop_path: float
    groups: int
    kernel_init: Initializer
    dtype: Dtype
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        common = {"kernel_init": self.kernel_init, "dtype": self.dtype}
        conv = functools.partial(Conv, use_bias=self.folded, **common)
        norm = functools.partial(BatchNorm, dtype=self.dtype, folded="merged" if self.folded else "")
        y = conv(self.width, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y, train=train))
        y = conv(self.width, 3, self.stride, groups=self.groups, name="conv2")(y)
        y = nn.relu(norm(name="norm2")(y, train=train))
        y = conv(self.out, name="conv3")(y)
        y = norm(name="norm3")(y, train=train)
        if x.shape != y.shape:
            x = ConvNorm(self.out, 1, self.stride, **common, folded=self.folded, name="shortcut")(x, train=train)
        return nn.relu(DropPath(self.drop_path, name="drop_path")(y, train=train) + x)


class TiedBottleneck(nn.Module):
    """A bottleneck whose 1x1 convolutions are its stage's W and W.T: [b, h, w, out] -> [b, h/stride, w/stride, out].

    `norm_first` normalises before W instead of after it.
    """

    tied: TiedDense
    stride: int
    drop_path: float
    groups: int
    norm_first: bool
    kernel_init: Initializer
    dtype: Dtype
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, shortcut: jax.Array, *, train: bool) -> jax.Array:
        # The blocks share W, so the norm of one block cannot be merged into it.
        norm = functools.partial(BatchNorm, dtype=self.dtype, folded="affine" if self.folded else "")
        norm1 = norm(name="norm1")
        if self.norm_first:
            y = self.tied.project(nn.relu(norm1(x, train=train)))
        else:
            y = nn.relu(norm1(self.tied.project(x), train=train))
        common = {"kernel_init": self.kernel_init, "dtype": self.dtype, "use_bias": self.folded}
        y = Conv(y.shape[-1], 3, self.stride, groups=self.groups, **common, name="conv2")(y)
        y = nn.relu(norm(folded="merged" if self.folded else "", name="norm2")(y, train=train))
        y = norm(name="norm3")(self.tied.project_back(y), train=train)
        return nn.relu(DropPath(self.drop_path, name="drop_path")(y, train=train) + shortcut)
