"""PVTv2: the Pyramid Vision Transformer with overlapping patches and convolutional feed-forward layers.

Wenhai Wang, Enze Xie, Xiang Li, Deng-Ping Fan, Kaitao Song, Ding Liang, Tong Lu, Ping Luo, Ling Shao, "PVT v2: Improved
Baselines with Pyramid Vision Transformer", 2021, https://arxiv.org/abs/2106.13797.

Convolutions replace the positions, each stage ends with a norm, and the classifier reads the mean of the last map.

Shapes: `b` batch, `h w` height and width of a stage's input, `u v` of its map, `n` tokens, `d` width.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.conv import Conv
from halvit_jax.layers.ffn import Compact, CompactDense, fold, gelu
from halvit_jax.layers.initializers import Dtype, normal_02
from halvit_jax.models import pvt
from halvit_jax.models.family import Family, Fields, Published
from halvit_jax.models.pvt import EMBED_EPSILON, EPSILON
from halvit_jax.models.vit import HC

# Convolutions are initialised normally, with the variance 2 / (k k f / groups): depthwise ones of 3x3 with 2 / 9.
ZEROS = nn.initializers.zeros
FAN_OUT = {"kernel_init": nn.initializers.variance_scaling(2.0, "fan_out", "normal"), "bias_init": ZEROS}
DEPTHWISE = {"kernel_init": nn.initializers.normal(math.sqrt(2 / 9)), "bias_init": ZEROS}


class PVTv2(pvt.Pyramid):
    """Patches that overlap, a convolution in the feed-forward layers and a norm after each stage.

    The maps of `features` are normalised. Images may have any size: a stage has ceil(h / stride) rows. With `pool_size`
    (7 in PVTv2-Li) attention has its square of keys in all stages, so the time is linear in the pixels of the image;
    `reductions` are then not used.
    """

    pool_size: int = 0

    def _stage(self, i: int) -> nn.Module:
        ffn = functools.partial(ConvMlp, relu=self.pool_size > 0)
        blocks = self._blocks(i, ffn, convolutional=True, pool_size=self.pool_size, **FAN_OUT)
        return OverlapStage(self.widths[i], self.strides[i], blocks, self.dtype, name=f"stage{i + 1}")

    def _pooled(self, images: jax.Array, train: bool) -> jax.Array:
        maps = self.features(images, train=train)
        return maps[max(maps)].mean((1, 2), dtype=jnp.float32)


class OverlapStage(nn.Module):
    """Patches, blocks and norm of PVTv2: [b, h, w, c] -> [b, u, v, d]."""

    width: int
    stride: int
    blocks: Callable[..., jax.Array]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        patch = 2 * self.stride - 1  # 7 of stride 4, 3 of stride 2
        x = Conv(self.width, patch, self.stride, use_bias=True, **FAN_OUT, dtype=self.dtype, name="embed")(x)
        b, u, v, d = x.shape
        x = nn.LayerNorm(EMBED_EPSILON, dtype=self.dtype, name="embed_norm")(x.reshape(b, u * v, d))
        x = self.blocks(x, (u, v), train=train)
        return nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm")(x).reshape(b, u, v, d)


class ConvMlp(nn.Module):
    """W2 gelu(depthwise 3x3 convolution(W1 x + b1)) + b2 on the tokens of a map: [b, n, d] -> [b, n, d].

    `relu`: a ReLU before the convolution, in blocks of linear attention. The second matrix may be compact.
    """

    width: int
    hidden: int
    compact: Compact
    grid: tuple[int, int]
    relu: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        h = nn.Dense(self.hidden, kernel_init=normal_02, dtype=self.dtype, name="expand")(x)
        h = (nn.relu(h) if self.relu else h).reshape(x.shape[0], *self.grid, self.hidden)  # [b, u, v, hidden]
        depthwise = Conv(
            self.hidden, 3, groups=self.hidden, use_bias=True, **DEPTHWISE, dtype=self.dtype, name="depthwise"
        )
        h = depthwise(h).reshape(*x.shape[:2], self.hidden)  # [b, n, hidden]
        return CompactDense(self.width, self.compact, dtype=self.dtype, name="reduce")(gelu(h), train=train)


SIZES: dict[str, Fields] = {
    "pvt_v2_b0": {"widths": (32, 64, 160, 256), "head_width": 32},
    "pvt_v2_b1": {},
    "pvt_v2_b2": pvt.SMALL,
    "pvt_v2_b2_li": pvt.SMALL | {"pool_size": 7},
    "pvt_v2_b3": pvt.MEDIUM,
    "pvt_v2_b4": pvt.LARGE,
    "pvt_v2_b5": {"depths": (3, 6, 40, 3), "ffn_ratios": (4, 4, 4, 4)},
    "pvt_v2_b2_hc": pvt.SMALL | HC,
}

ONE_STAGE = {"strides": (4,), "widths": (16,), "depths": (1,), "ffn_ratios": (2,), "reductions": (2,)}

FAMILY = Family(
    model=PVTv2,
    sizes=SIZES,
    partition_rules=pvt.PARTITION_RULES,
    transfer_rules=pvt.TRANSFER_RULES,
    tiny=pvt.TINY_SHAPE | ONE_STAGE,
    fold=fold,
    published={
        "pvt_v2_b0": Published(70.5, "PVTv2, 300 epochs"),
        "pvt_v2_b1": Published(78.7, "PVTv2, 300 epochs"),
        "pvt_v2_b2": Published(82.0, "PVTv2, 300 epochs"),
        "pvt_v2_b2_li": Published(82.1, "PVTv2, 300 epochs"),
        "pvt_v2_b3": Published(83.1, "PVTv2, 300 epochs"),
        "pvt_v2_b4": Published(83.6, "PVTv2, 300 epochs"),
        "pvt_v2_b5": Published(83.8, "PVTv2, 300 epochs"),
    },
    baselines={"pvt_v2_b2_hc": "pvt_v2_b2"},
)
