"""ResNet and ResNeXt, and HaLViT's tied versions of them.

- ResNet: Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
  https://arxiv.org/abs/1512.03385, with the stride in the 3x3 convolution as in torchvision.
- ResNeXt: Saining Xie, Ross Girshick, Piotr Dollár, Zhuowen Tu, Kaiming He, "Aggregated Residual Transformations for
  Deep Neural Networks", CVPR 2017, https://arxiv.org/abs/1611.05431: the 3x3 convolution in groups.
- HaLViT-ResNet and -ResNeXt: Onur Can Koyun, Behçet Uğur Töreyin, "HaLViT: Half of the Weights are Enough", CVPR
  Workshops 2024, https://doi.org/10.1109/CVPRW63382.2024.00370, as the authors released them
  (github.com/sp4cing-itu/halvit). In stages 3 and 4 all bottlenecks of a stage share one kernel W, as x @ W on the way
  in and as h @ W.T on the way out. The two differ in the widening of a stage's input and in the place of the norms.

Shapes: `b` batch, `h w` space, `c` channels; `out` channels between the blocks of a stage, `width` inside them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.batch_norm import BatchNorm, norms_in_evaluation
from halvit_jax.layers.conv import Conv, ConvNorm, max_pool
from halvit_jax.layers.drop import stage_rates
from halvit_jax.layers.ffn import gelu
from halvit_jax.layers.initializers import Dtype, Initializer, torch_uniform, torch_uniform_bias
from halvit_jax.layers.remat import run_block
from halvit_jax.layers.residual import BasicBlock, Bottleneck, TiedBottleneck
from halvit_jax.layers.tied import TiedDense
from halvit_jax.models.family import Family, Fields, Published
from halvit_jax.models.partition import COLUMNS, FILTERS, VECTORS
from halvit_jax.models.validation import check_channels, check_choice, check_rate

STRIDES = (4, 8, 16, 32)  # of the four stages' maps against the image

_kaiming_fan_out: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_xavier_normal: Initializer = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")

KERNEL_INITS: dict[str, Initializer] = {"kaiming_fan_out": _kaiming_fan_out, "torch_uniform": torch_uniform}


class ResNet(nn.Module):
    """Four stages of residual blocks between a 7x7 stem and a linear head.

    `__call__(images, train=...)` takes normalised images [b, h, w, 3] to float32 logits [b, num_classes], or to pooled
    features [b, c] when `num_classes` is 0. Batch statistics are in the collection `batch_stats`, mutable in training.
    """

    depths: Sequence[int] = (3, 4, 6, 3)  # blocks in each stage
    stages: Sequence[str] = ("bottleneck",) * 4  # keys of STAGES
    groups: int = 1  # of the 3x3 convolutions
    base_width: int = 64  # channels of one group in the first stage
    kernel_init: str = "kaiming_fan_out"  # of every convolution: a key of KERNEL_INITS
    zero_init_residual: bool = False  # the scale of each block's last norm starts at 0, as in timm
    num_classes: int = 1000
    drop_path: float = 0.0  # stochastic depth of the last block; the others' rates rise to it linearly from 0
    image_size: int = 224  # of the recipe's images; the network runs at any size
    in_channels: int = 3  # of the images: 1 of grey ones
    dtype: Dtype = None  # the type to compute in; parameters and statistics are float32
    remat: bool = False  # recompute each block in the backward pass instead of keeping its activations
    folded: bool = False  # for inference only, with the variables of `layers.batch_norm.fold`

    def __post_init__(self) -> None:
        if not len(self.depths) == len(self.stages) == len(STRIDES):
            raise ValueError(
                f"model.depths={tuple(self.depths)} and model.stages={tuple(self.stages)} must both have four entries"
            )
        if min(self.depths) < 1:
            raise ValueError(f"model.depths={tuple(self.depths)} must all be at least 1")
        for kind in self.stages:
            check_choice("stages", kind, STAGES)
        check_choice("kernel_init", self.kernel_init, KERNEL_INITS)
        if "basic" in self.stages and (self.groups, self.base_width) != (1, 64):
            raise ValueError(
                f"model.groups={self.groups} and model.base_width={self.base_width} must be 1 and 64 where "
                "model.stages has 'basic', whose blocks have no groups"
            )
        if min(self.groups, self.base_width) < 1:
            raise ValueError(f"model.groups={self.groups} and model.base_width={self.base_width} must be at least 1")
        check_rate("drop_path", self.drop_path)
        super().__post_init__()

    def setup(self) -> None:
        init = KERNEL_INITS[self.kernel_init]
        self.stem = ConvNorm(64, 7, 2, kernel_init=init, dtype=self.dtype, folded=self.folded)
        rates = stage_rates(self.drop_path, self.depths)
        for i, kind in enumerate(self.stages):
            mid = 64 * 2**i
            stage = STAGES[kind](
                out=mid * EXPANSION[kind],
                width=mid * self.base_width // 64 * self.groups,
                rates=rates[i],
                stride=1 if i == 0 else 2,
                groups=self.groups,
                kernel_init=init,
                zero_init=self.zero_init_residual,
                dtype=self.dtype,
                remat=self.remat,
                folded=self.folded,
            )
            setattr(self, f"stage{i + 1}", stage)
        if self.num_classes:
            # Always float32: it costs nothing and the loss reads it.
            bias = torch_uniform_bias(stage.out)
            self.head = nn.Dense(self.num_classes, dtype=jnp.float32, kernel_init=torch_uniform, bias_init=bias)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = self.features(images, train=train)[STRIDES[-1]].mean((1, 2), dtype=jnp.float32)
        return self.head(x) if self.num_classes else x

    def features(self, images: jax.Array, *, train: bool, frozen_norms: bool = False) -> dict[int, jax.Array]:
        """The outputs of the stages: {4: [b, h/4, w/4, c], 8: ..., 16: ..., 32: [b, h/32, w/32, c]}."""
        maps = {}
        with norms_in_evaluation(frozen_norms):
            check_channels(images, self.in_channels)
            x = nn.relu(self.stem(images, train=train))
            x = max_pool(x, size=3, stride=2, padding=1)
            for i, stride in enumerate(STRIDES):
                x = maps[stride] = getattr(self, f"stage{i + 1}")(x, train=train)
        return maps


class Stage(nn.Module):
    """Base of all kinds of stage: [b, h, w, c] -> [b, h/stride, w/stride, out]."""

    out: int
    width: int
    rates: tuple[float, ...]  # stochastic depth of each block
    stride: int  # of the first block
    groups: int
    kernel_init: Initializer
    zero_init: bool  # of the scale of each block's last norm
    dtype: Dtype
    remat: bool
    folded: bool

    def _run(self, block: nn.Module, *arrays: jax.Array, train: bool) -> jax.Array:
        return run_block(block, *arrays, remat=self.remat, train=train)

    def _common(self) -> dict[str, Any]:
        return {"kernel_init": self.kernel_init, "dtype": self.dtype, "folded": self.folded}

    def _of_block(self) -> dict[str, Any]:
        return {**self._common(), "zero_init": self.zero_init}


class BasicStage(Stage):
    """Blocks of two 3x3 convolutions."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for i, rate in enumerate(self.rates):
            stride = self.stride if i == 0 else 1
            x = self._run(BasicBlock(self.out, stride, rate, **self._of_block(), name=f"block{i}"), x, train=train)
        return x


class BottleneckStage(Stage):
    """Bottlenecks with their own kernels."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for i, rate in enumerate(self.rates):
            stride = self.stride if i == 0 else 1
            block = Bottleneck(self.out, self.width, stride, rate, self.groups, **self._of_block(), name=f"block{i}")
            x = self._run(block, x, train=train)
        return x


class HalvitStage(Stage):
    """Bottlenecks around one kernel W [out, width], as in HaLViT-ResNet.

    A depthwise 3x3 convolution widens the input instead of a 1x1: its channels are concatenated before the input. The
    shortcut of the first block is a strided depthwise 3x3 with two norms in a row, as released.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        tied = TiedDense(self.out, self.width, _xavier_normal, self.dtype, name="tied")
        channels = x.shape[-1]
        if channels != self.out:
            widen = ConvNorm(self.out - channels, 3, groups=channels, **self._common(), name="widen")
            x = jnp.concatenate([gelu(widen(x, train=train)), x], axis=-1)
        shortcut = x
        if self.stride != 1:
            strided = ConvNorm(self.out, 3, self.stride, groups=self.out, **self._common(), name="shortcut")
            norm = BatchNorm(dtype=self.dtype, folded="merged" if self.folded else "", name="shortcut_norm")
            shortcut = norm(strided(x, train=train), train=train)
        for i, rate in enumerate(self.rates):
            stride = self.stride if i == 0 else 1
            block = TiedBottleneck(tied, stride, rate, self.groups, False, **self._of_block(), name=f"block{i}")
            x = self._run(block, x, shortcut if i == 0 else x, train=train)
        return x


class HalvitPrenormStage(Stage):
    """Bottlenecks around one kernel W [out, width], normalising before W, as in HaLViT-ResNeXt.

    A bare 1x1 convolution widens the first block's input; its shortcut is a strided 1x1 convolution with a norm.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        tied = TiedDense(self.out, self.width, _kaiming_fan_out, self.dtype, name="tied")
        channels, shortcut = x.shape[-1], x
        if channels != self.out or self.stride != 1:
            shortcut = ConvNorm(self.out, 1, self.stride, **self._common(), name="shortcut")(x, train=train)
        if channels != self.out:
            x = Conv(self.out, kernel_init=self.kernel_init, dtype=self.dtype, name="widen")(x)
        for i, rate in enumerate(self.rates):
            stride = self.stride if i == 0 else 1
            block = TiedBottleneck(tied, stride, rate, self.groups, True, **self._of_block(), name=f"block{i}")
            x = self._run(block, x, shortcut if i == 0 else x, train=train)
        return x


STAGES: dict[str, Callable[..., Stage]] = {
    "basic": BasicStage,
    "bottleneck": BottleneckStage,
    "halvit": HalvitStage,
    "halvit_prenorm": HalvitPrenormStage,
}
EXPANSION = {"basic": 1, "bottleneck": 4, "halvit": 4, "halvit_prenorm": 4}  # out / the stage's nominal width


SIZES: dict[str, Fields] = {
    "resnet18": {"depths": (2, 2, 2, 2), "stages": ("basic",) * 4},
    "resnet50": {"depths": (3, 4, 6, 3)},
    "resnet101": {"depths": (3, 4, 23, 3)},
    "resnext101_32x8d": {"depths": (3, 4, 23, 3), "groups": 32, "base_width": 8},
    "halvit_resnet50": {
        "depths": (3, 4, 6, 3),
        "stages": ("bottleneck", "bottleneck", "halvit", "halvit"),
        "kernel_init": "torch_uniform",
    },
    "halvit_resnext101_32x8d": {
        "depths": (3, 4, 23, 3),
        "stages": ("bottleneck", "bottleneck", "halvit_prenorm", "halvit_prenorm"),
        "groups": 32,
        "base_width": 8,
    },
}

PARTITION_RULES = ((r"(tied|head)/kernel$", COLUMNS), (r"(conv\d?|widen)/kernel$", FILTERS), VECTORS)
TRANSFER_RULES = ((r"^head/", "head"), (r"^stem/conv/kernel$", "input_channels"))

FAMILY = Family(
    model=ResNet,
    sizes=SIZES,
    partition_rules=PARTITION_RULES,
    transfer_rules=TRANSFER_RULES,
    tiny={"depths": (1, 1, 2, 1), "image_size": 32},
    published={
        "halvit_resnet50": Published(75.1, "HaLViT; counted without the classifier", params="13.4M"),
        "resnet18": Published(69.76, "torchvision V1, 90 epochs"),
        "resnet50": Published(76.13, "torchvision V1, 90 epochs"),
        "resnet101": Published(77.37, "torchvision V1, 90 epochs"),
        "resnext101_32x8d": Published(79.31, "torchvision V1, 100 epochs"),
    },
    baselines={"halvit_resnet50": "resnet50", "halvit_resnext101_32x8d": "resnext101_32x8d"},
)
