"""RegNetY, the convolutional teacher of DeiT.

Ilija Radosavovic, Raj Prateek Kosaraju, Ross Girshick, Kaiming He, Piotr Dollár, "Designing Network Design Spaces",
CVPR 2020, https://arxiv.org/abs/2003.13678.

Every stage repeats one block; widths and depths come from the quantised line of section 3.3,

    u_j = w_0 + w_a j;   w_j = w_0 w_m^round(log_wm(u_j / w_0)), rounded to multiples of 8, then of a group's width

where blocks j of equal w_j make a stage. Y means squeeze-excite in every block.

Shapes: `b` batch, `h w` space, `c` channels, `out` channels of a stage.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.batch_norm import norms_in_evaluation
from halvit_jax.layers.conv import ConvNorm, SqueezeExcite
from halvit_jax.layers.drop import DropPath, stage_rates
from halvit_jax.layers.initializers import Dtype, Initializer
from halvit_jax.layers.remat import run_block
from halvit_jax.models.family import Family, Fields, Published
from halvit_jax.models.partition import COLUMNS, FILTERS, VECTORS
from halvit_jax.models.validation import check_channels, check_rate

STEM = 32  # channels
SQUEEZE = 0.25  # hidden channels of squeeze-excite / input channels of its block

_kaiming_fan_out: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_head_init: Initializer = nn.initializers.normal(stddev=0.01)


class RegNet(nn.Module):
    """Stages of residual blocks with grouped convolutions and squeeze-excite, between a 3x3 stem and a linear head.

    `__call__(images, train=...)` takes normalised images [b, h, w, 3] to float32 logits [b, num_classes], or to pooled
    features [b, c] when `num_classes` is 0. The stem and each stage halve the resolution. Batch statistics are in the
    collection `batch_stats`, mutable in training.
    """

    depths: Sequence[int] = (2, 4, 11, 1)  # blocks in each stage
    widths: Sequence[int] = (224, 448, 1232, 3024)  # channels of each stage, everywhere in its blocks
    group_width: int = 112  # channels of a group of the 3x3 convolutions
    num_classes: int = 1000
    drop_path: float = 0.0  # stochastic depth of the last block; the others' rates rise to it linearly from 0
    image_size: int = 224  # of the recipe's images; the network runs at any size
    in_channels: int = 3  # of the images: 1 of grey ones
    dtype: Dtype = None  # the type to compute in; parameters and statistics are float32
    remat: bool = False  # recompute each block in the backward pass instead of keeping its activations
    folded: bool = False  # for inference only, with the variables of `layers.batch_norm.fold`

    def __post_init__(self) -> None:
        depths, widths = tuple(self.depths), tuple(self.widths)
        if len(depths) != len(widths) or min((*depths, *widths), default=0) < 1:
            raise ValueError(
                f"model.depths={depths} and model.widths={widths} must have one number of at least 1 for each stage"
            )
        if self.group_width < 1 or any(width % self.group_width for width in widths):
            raise ValueError(f"model.group_width={self.group_width} does not divide all of model.widths={widths}")
        check_rate("drop_path", self.drop_path)
        super().__post_init__()

    def setup(self) -> None:
        common = {"dtype": self.dtype, "folded": self.folded}
        self.stem = ConvNorm(STEM, 3, 2, kernel_init=_kaiming_fan_out, **common)
        rates = stage_rates(self.drop_path, self.depths)
        for i, width in enumerate(self.widths):
            setattr(self, f"stage{i + 1}", Stage(width, self.group_width, rates[i], remat=self.remat, **common))
        if self.num_classes:
            # Always float32: it costs nothing and the loss reads it.
            self.head = nn.Dense(self.num_classes, dtype=jnp.float32, kernel_init=_head_init)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        maps = self.features(images, train=train)
        x = maps[max(maps)].mean((1, 2), dtype=jnp.float32)
        return self.head(x) if self.num_classes else x

    def features(self, images: jax.Array, *, train: bool, frozen_norms: bool = False) -> dict[int, jax.Array]:
        """The outputs of the stages: {4: [b, h/4, w/4, c], 8: ..., 16: ..., 32: [b, h/32, w/32, c]}."""
        maps = {}
        with norms_in_evaluation(frozen_norms):
            check_channels(images, self.in_channels)
            x = nn.relu(self.stem(images, train=train))
            for i in range(len(self.depths)):
                x = maps[4 * 2**i] = getattr(self, f"stage{i + 1}")(x, train=train)
        return maps


class Stage(nn.Module):
    """Blocks; the first one halves the map: [b, h, w, c] -> [b, h/2, w/2, out]."""

    out: int
    group_width: int
    rates: tuple[float, ...]  # stochastic depth of each block
    dtype: Dtype
    remat: bool
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for i, rate in enumerate(self.rates):
            stride = 2 if i == 0 else 1
            block = Block(self.out, self.group_width, stride, rate, self.dtype, self.folded, name=f"block{i}")
            x = run_block(block, x, remat=self.remat, train=train)
        return x


class Block(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions of one width and a shortcut: [b, h, w, c] -> [b, h/stride, w/stride, out].

    Squeeze-excite comes before the last convolution.
    """

    out: int
    group_width: int
    stride: int
    drop_path: float
    dtype: Dtype
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        common = {"kernel_init": _kaiming_fan_out, "dtype": self.dtype, "folded": self.folded}
        groups = self.out // self.group_width
        y = nn.relu(ConvNorm(self.out, **common, name="conv1")(x, train=train))
        y = nn.relu(ConvNorm(self.out, 3, self.stride, groups=groups, **common, name="conv2")(y, train=train))
        y = SqueezeExcite(round(SQUEEZE * x.shape[-1]), dtype=self.dtype, name="squeeze_excite")(y)
        y = ConvNorm(self.out, **common, name="conv3")(y, train=train)
        if x.shape != y.shape:
            x = ConvNorm(self.out, 1, self.stride, **common, name="shortcut")(x, train=train)
        return nn.relu(DropPath(self.drop_path, name="drop_path")(y, train=train) + x)


SIZES: dict[str, Fields] = {
    "regnety_002": {"depths": (1, 1, 4, 7), "widths": (24, 56, 152, 368), "group_width": 8},
    "regnety_160": {"depths": (2, 4, 11, 1), "widths": (224, 448, 1232, 3024), "group_width": 112},
}

PARTITION_RULES = ((r"head/kernel$", COLUMNS), (r"(conv|reduce|expand)/kernel$", FILTERS), VECTORS)
TRANSFER_RULES = ((r"^head/", "head"), (r"^stem/conv/kernel$", "input_channels"))

FAMILY = Family(
    model=RegNet,
    sizes=SIZES,
    partition_rules=PARTITION_RULES,
    transfer_rules=TRANSFER_RULES,
    tiny={"depths": (1, 1, 2, 1), "widths": (16, 24, 32, 48), "group_width": 8, "image_size": 32},
    published={"regnety_160": Published(82.9, "as DeiT's teacher; 83.0 at a crop of 0.95")},
)
