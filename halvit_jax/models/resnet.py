"""ResNet and ResNeXt, and HaLViT's halves of them.

- ResNet: He et al. 2016, arXiv 1512.03385, with the stride in the 3x3 convolution as in torchvision ("v1.5").
- ResNeXt: Xie et al. 2017, arXiv 1611.05431; the 3x3 convolution in groups.
- HaLViT-ResNet and -ResNeXt: the authors' released networks (github.com/sp4cing-itu/halvit). In stages 3 and 4 one kernel W
  serves every bottleneck of the stage, as x @ W into it and as h @ W.T out of it. The two differ in the order of norms and
  in how a stage widens its input.

Shapes: `b` batch, `h w` space, `c` channels; a stage's `mid` channels inside and `out` = 4 * mid around its bottlenecks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.conv import BatchNorm, Conv, ConvNorm, max_pool
from halvit_jax.layers.init import Dtype, Initializer, torch_uniform, torch_uniform_bias
from halvit_jax.layers.tied import TiedDense

kaiming_fan_out: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
xavier_normal: Initializer = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")

STRIDES = (4, 8, 16, 32)  # of the four stages' outputs against the image


class ResNet(nn.Module):
    """Four stages of residual blocks between a 7x7 stem and a linear head.

    `__call__(images, train=...)` takes normalised images [b, h, w, 3] to float32 logits [b, num_classes], or to the pooled
    features [b, c] when `num_classes` is 0; `features` gives the four stages' maps as {stride: [b, h, w, c]}. Batch
    statistics live in the collection `batch_stats`, which training must make mutable.

    Raises ValueError for a kind of stage that is not in `STAGES` and for depths and kinds that are not four.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    stages: tuple[str, ...] = ("bottleneck",) * 4  # keys of STAGES
    groups: int = 1
    base_width: int = 64  # channels of a group in the first stage
    kernel_init: str = "kaiming_fan_out"  # of the convolutions: a key of KERNEL_INITS
    num_classes: int = 1000
    image_size: int = 224  # what the recipe trains at; any size runs
    dtype: Dtype = None
    remat: bool = False  # recompute each block in the backward pass

    def setup(self) -> None:
        _check("stages", self.stages, STAGES)
        _check("kernel_init", (self.kernel_init,), KERNEL_INITS)
        for field in ("depths", "stages"):
            if len(getattr(self, field)) != len(STRIDES):
                raise ValueError(f"{field}={getattr(self, field)} must name {len(STRIDES)} stages; change model.{field}")
        init = KERNEL_INITS[self.kernel_init]
        self.stem = ConvNorm(64, 7, 2, kernel_init=init, dtype=self.dtype)
        for i, (kind, depth) in enumerate(zip(self.stages, self.depths, strict=True)):
            stage = STAGES[kind](
                mid=64 * 2**i,
                depth=depth,
                stride=1 if i == 0 else 2,
                groups=self.groups,
                base_width=self.base_width,
                kernel_init=init,
                dtype=self.dtype,
                remat=self.remat,
            )
            setattr(self, f"stage{i + 1}", stage)
        if self.num_classes:
            self.head = nn.Dense(
                self.num_classes,
                kernel_init=torch_uniform,
                bias_init=torch_uniform_bias(stage.out),
                dtype=self.dtype,
            )

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = self.features(images, train=train)[STRIDES[-1]]
        x = x.mean((1, 2), dtype=jnp.float32)
        return self.head(x).astype(jnp.float32) if self.num_classes else x

    def features(self, images: jax.Array, *, train: bool) -> dict[int, jax.Array]:
        """The output of each stage: {4: [b, h/4, w/4, c], ..., 32: [b, h/32, w/32, c]}."""
        x = images if self.dtype is None else images.astype(self.dtype)
        x = nn.relu(self.stem(x, train=train))
        x = max_pool(x, size=3, stride=2, padding=1)
        maps = {}
        for i, stride in enumerate(STRIDES):
            x = maps[stride] = getattr(self, f"stage{i + 1}")(x, train=train)
        return maps


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [b, h, w, c] -> [b, h/stride, w/stride, mid]."""

    mid: int
    out: int
    stride: int
    groups: int
    width: int
    kernel_init: Initializer
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        common = {"kernel_init": self.kernel_init, "dtype": self.dtype}
        y = nn.relu(ConvNorm(self.mid, 3, self.stride, name="conv1", **common)(x, train=train))
        y = ConvNorm(self.out, 3, name="conv2", **common)(y, train=train)
        if x.shape != y.shape:
            x = ConvNorm(self.out, 1, self.stride, name="shortcut", **common)(x, train=train)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: [b, h, w, c] -> [b, h/stride, w/stride, out]."""

    mid: int
    out: int
    stride: int
    groups: int
    width: int
    kernel_init: Initializer
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        common = {"kernel_init": self.kernel_init, "dtype": self.dtype}
        y = nn.relu(ConvNorm(self.width, name="conv1", **common)(x, train=train))
        y = nn.relu(ConvNorm(self.width, 3, self.stride, groups=self.groups, name="conv2", **common)(y, train=train))
        y = ConvNorm(self.out, name="conv3", **common)(y, train=train)
        if x.shape != y.shape:
            x = ConvNorm(self.out, 1, self.stride, name="shortcut", **common)(x, train=train)
        return nn.relu(x + y)


class Stage(nn.Module):
    mid: int
    depth: int
    stride: int
    groups: int
    base_width: int
    kernel_init: Initializer
    dtype: Dtype
    remat: bool
    block: Any = Bottleneck
    expansion: int = 4

    @property
    def out(self) -> int:
        return self.mid * self.expansion

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        block = nn.remat(self.block, static_argnums=(2,)) if self.remat else self.block
        width = self.mid * self.base_width // 64 * self.groups
        for i in range(self.depth):
            x = block(self.mid, self.out, self.stride if i == 0 else 1, self.groups, width, self.kernel_init, self.dtype, name=f"block{i}")(x, train)
        return x

import functools
STAGES = {"basic": functools.partial(Stage, block=BasicBlock, expansion=1), "bottleneck": Stage}
KERNEL_INITS: dict[str, Initializer] = {"kaiming_fan_out": kaiming_fan_out, "torch_uniform": torch_uniform}

SIZES = {
    "resnet18": {"depths": (2, 2, 2, 2), "stages": ("basic",) * 4},
    "resnet50": {"depths": (3, 4, 6, 3)},
    "resnet101": {"depths": (3, 4, 23, 3)},
    "resnext101_32x8d": {"depths": (3, 4, 23, 3), "groups": 32, "base_width": 8},
}
def _check(field, given, allowed):
    for value in given:
        if value not in allowed:
            raise ValueError(f"{value!r} {sorted(allowed)}; change model.{field}")
