"""Pyramid Vision Transformers: PVT (Wang et al., 2021, arXiv 2102.12122) and PVTv2 (2021, arXiv 2106.13797).

    x = norm(patches of the map before) + position;  x += attention over fewer keys(norm(x));  x += ffn(norm(x));  ...

in each stage. PVT classifies by a class token in the last one. PVTv2 has patches that overlap and a convolution in its
feed-forward layers instead of positions, a norm after each stage, and classifies by the mean of the last map.

Shapes: `b` batch, `h w` height and width of what a stage is given, `u v` of its map, `n` tokens, `d` width.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.conv import Conv
from halvit_jax.layers.drop import DropPath, linear_rates
from halvit_jax.layers.embed import PatchEmbed
from halvit_jax.layers.ffn import Compact, CompactDense, Mlp, gelu
from halvit_jax.layers.fused_attention import CHOICES
from halvit_jax.layers.initializers import Dtype, normal_02
from halvit_jax.layers.sow import keep
from halvit_jax.layers.spatial_reduction import SpatialReductionAttention
from halvit_jax.models.validation import check_choice, check_compact, check_divides
from halvit_jax.models.vit import HC

EPSILON = 1e-6  # of the LayerNorms in blocks and at the end of stages
EMBED_EPSILON = 1e-5  # of those of patches

# PVTv2's convolutions begin normal with the variance 2 / (k k f / groups): depthwise ones of 3x3 with 2 / 9.
ZEROS = nn.initializers.zeros
FAN_OUT = {"kernel_init": nn.initializers.variance_scaling(2.0, "fan_out", "normal"), "bias_init": ZEROS}
DEPTHWISE = {"kernel_init": nn.initializers.normal(math.sqrt(2 / 9)), "bias_init": ZEROS}

SMALL, MEDIUM, LARGE = ({"depths": depths} for depths in ((3, 4, 6, 3), (3, 4, 18, 3), (3, 8, 27, 3)))
SIZES: dict[str, dict[str, Any]] = {
    "pvt_tiny": {},
    "pvt_small": SMALL,
    "pvt_medium": MEDIUM,
    "pvt_large": LARGE,
    "pvt_tiny_hc": HC,
    "pvt_small_hc": SMALL | HC,
    "pvt_medium_hc": MEDIUM | HC,
    "pvt_large_hc": LARGE | HC,
}
V2_SIZES: dict[str, dict[str, Any]] = {
    "pvt_v2_b0": {"widths": (32, 64, 160, 256), "head_width": 32},
    "pvt_v2_b1": {},
    "pvt_v2_b2": SMALL,
    "pvt_v2_b2_li": SMALL | {"pool_size": 7},
    "pvt_v2_b3": MEDIUM,
    "pvt_v2_b4": LARGE,
    "pvt_v2_b5": {"depths": (3, 6, 40, 3), "ffn_ratios": (4, 4, 4, 4)},
    "pvt_v2_b2_hc": SMALL | HC,
}

SPLIT = ("tensor", "fsdp")  # as in models.vit
PARTITION_RULES = (
    (r"(query|key_value|expand|head|second\d?(/dense)?)/kernel$", (None, SPLIT)),
    (r"(output|reduce|first\d?(/dense)?)/kernel$", (SPLIT, None)),
    (r"depthwise/kernel$", (None, None, None, SPLIT)),  # as what it follows
    (r"(embed|reduction)/kernel$", (None, None, None, "fsdp")),
    (r"(bias|scale|mean|var|class_token|position|across|within)$", ()),
)

TRANSFER_RULES = ((r"^head/", "head"), (r"/position$", "grid"), (r"^stage1/embed/kernel$", "colours"))


class Pyramid(nn.Module):
    """Stages of transformer blocks, each on a smaller and wider map: what PVT and PVTv2 have in common.

    `__call__(images, train=...)` takes normalised images [b, h, w, 3] to float32 logits [b, num_classes], or to pooled
    features [b, d] when `num_classes` is 0.

    Args:
        num_classes: size of the head; 0 leaves it out.
        image_size: height and width of the images.
        strides: of each stage's map against the one before.
        widths: of each stage's tokens.
        depths: blocks in each stage.
        head_width: of one attention head, in all stages.
        ffn_ratios: hidden width / width of each stage's feed-forward layers.
        reductions: side of the square of tokens that becomes one key, in each stage.
        real_heads: share of the heads with queries and keys of their own, rounded up; the maps of the others are
            hallucinated from theirs, out of their "logits" or their "maps" (`hallucinate`); see `AttentionMaps`.
        attention_impl: "xla", or "fused": without the maps in memory; "auto": fused where it can be, see `attend`.
        ffn_rank: rank of the FFNs' second matrix as a share of the width; below 1 it is two matrices, in training each
            the sum of `ffn_branches`; see `CompactDense`.
        drop_path: stochastic depth of the last block; the others' rates rise to it linearly from 0.
        remat: recompute each block in the backward pass instead of keeping its activations.
        dtype: the type to compute in. Parameters, softmax and head are float32 whatever it is.
        folded: for inference alone, with the variables of `layers.ffn.fold`.
    """

    num_classes: int = 1000
    image_size: int = 224
    strides: Sequence[int] = (4, 2, 2, 2)
    widths: Sequence[int] = (64, 128, 320, 512)
    depths: Sequence[int] = (2, 2, 2, 2)
    head_width: int = 64
    ffn_ratios: Sequence[float] = (8, 8, 4, 4)
    reductions: Sequence[int] = (8, 4, 2, 1)
    real_heads: float = 1.0
    hallucinate: str = "logits"
    attention_impl: str = "auto"
    ffn_rank: float = 1.0
    ffn_branches: int = 2
    drop_path: float = 0.0
    remat: bool = False
    dtype: Dtype = jnp.float32
    folded: bool = False

    def __post_init__(self) -> None:
        for field in ("depths", "strides", "widths", "ffn_ratios", "reductions"):
            values = tuple(getattr(self, field))
            if not values or len(values) != len(self.depths):
                raise ValueError(f"model.{field}={values} must have a value for each stage, as many as model.depths")
            if field != "ffn_ratios" and min(values) < 1:
                raise ValueError(f"model.{field}={values} must be at least 1 in each stage")
        if 1 in self.strides[1:]:  # two maps would have the same stride
            raise ValueError(f"model.strides={tuple(self.strides)} must be at least 2 in all stages but the first")
        for width, ratio in zip(self.widths, self.ffn_ratios, strict=True):
            check_divides("head_width", self.head_width, "widths", width)
            if width * ratio < 1:
                raise ValueError(f"model.ffn_ratios={tuple(self.ffn_ratios)} leaves nothing of a width of {width}")
        check_choice("attention_impl", self.attention_impl, CHOICES)
        check_compact(self.real_heads, self.hallucinate, self.ffn_rank, self.ffn_branches)
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"model.drop_path={self.drop_path} must lie in [0, 1)")
        super().__post_init__()

    def setup(self) -> None:
        self.stages = [self._stage(i) for i in range(len(self.depths))]
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, kernel_init=normal_02, dtype=jnp.float32)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = self._pooled(images, train)
        return self.head(x) if self.num_classes else x

    def features(self, images: jax.Array, *, train: bool) -> dict[int, jax.Array]:
        """What each stage puts out, as detectors take it: {4: [b, h/4, w/4, d], 8: [b, h/8, w/8, d], ...}."""
        maps, x = {}, images
        for i, stage in enumerate(self.stages):
            x = maps[math.prod(self.strides[: i + 1])] = stage(x, train)
        return maps

    def _stage(self, i: int) -> nn.Module:
        """Stage i, counted from 0; it is called as stage(x, train)."""
        raise NotImplementedError

    def _pooled(self, images: jax.Array, train: bool) -> jax.Array:
        """What the head sees, [b, d] in float32."""
        raise NotImplementedError

    def _blocks(self, i: int, **fields: Any) -> tuple[Callable[..., nn.Module], ...]:
        """What makes the blocks of stage i, given their grid and name; they are called as block(x, train)."""
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        fields |= {
            "width": self.widths[i],
            "num_heads": self.widths[i] // self.head_width,
            "hidden": round(self.widths[i] * self.ffn_ratios[i]),
            "reduction": self.reductions[i],
            "real_heads": self.real_heads,
            "hallucinate": self.hallucinate,
            "attention_impl": self.attention_impl,
            "compact": Compact(self.ffn_rank, self.ffn_branches, self.folded),
            "dtype": self.dtype,
        }
        rates = linear_rates(self.drop_path, sum(self.depths))[sum(self.depths[:i]) :][: self.depths[i]]
        return tuple(functools.partial(block, drop_path=rate, **fields) for rate in rates)


class PVT(Pyramid):
    """Patches that do not overlap, learned positions, and a class token in the last stage, which has no reduction.

    The maps of `features` are not normalised, and their last stage runs without the class token. Images may be of any
    size that the product of `strides` divides: where it is not `image_size`, positions are resampled.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides("strides", math.prod(self.strides), "image_size", self.image_size)
        if self.reductions[-1] != 1:
            raise ValueError(f"model.reductions={tuple(self.reductions)} must end in 1: a class token is on no map")

    def _stage(self, i: int) -> nn.Module:
        side, last = self.image_size // math.prod(self.strides[: i + 1]), i == len(self.depths) - 1
        return Stage(self.widths[i], self.strides[i], side, last, self._blocks(i), self.dtype, name=f"stage{i + 1}")

    def _pooled(self, images: jax.Array, train: bool) -> jax.Array:
        *first, last = self.stages
        for stage in first:
            images = stage(images, train)
        return last(images, train, classify=True).astype(jnp.float32)


class PVTv2(Pyramid):
    """Patches that overlap, a convolution in the feed-forward layers and a norm after each stage.

    The maps of `features` are normalised. Images may be of any size: a stage gives ceil(h / stride) rows. With
    `pool_size` attention has that many keys squared in all stages, whatever the image, and costs time linear in its
    pixels (PVTv2-Li, where it is 7; then `reductions` are not used).
    """

    pool_size: int = 0

    def _stage(self, i: int) -> nn.Module:
        blocks = self._blocks(i, convolutional=True, pool_size=self.pool_size)
        return OverlapStage(self.widths[i], self.strides[i], blocks, self.dtype, name=f"stage{i + 1}")

    def _pooled(self, images: jax.Array, train: bool) -> jax.Array:
        maps = self.features(images, train=train)
        return maps[max(maps)].mean((1, 2), dtype=jnp.float32)


def resampled(position: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Positions [n, d] of a square map for one of u v tokens: [u v, d], bilinear as in PVT's detectors."""
    n, d = position.shape
    side = math.isqrt(n)
    if grid == (side, side):
        return position
    table = position.reshape(side, side, d)
    return jax.image.resize(table, (*grid, d), "linear", antialias=False).reshape(-1, d)


class Stage(nn.Module):
    """Patches, positions and blocks of PVT: [b, h, w, c] -> [b, u, v, d]; to `classify` -> class token [b, d]."""

    width: int
    stride: int
    side: int  # of the map that the table of positions is for
    last: bool  # whether the stage has a class token and a norm
    blocks: tuple[Callable[..., nn.Module], ...]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, classify: bool = False) -> jax.Array:
        b, h, w, _ = x.shape
        if h % self.stride or w % self.stride:
            raise ValueError(
                f"a map of {h}x{w} in {self.name} cannot be cut into patches of {self.stride}x{self.stride}; give "
                "images that the product of model.strides divides"
            )
        grid = h // self.stride, w // self.stride
        x = PatchEmbed(self.width, self.stride, dtype=self.dtype, name="embed")(x)  # [b, n, d]
        x = nn.LayerNorm(EMBED_EPSILON, dtype=self.dtype, name="embed_norm")(x)
        position = self.param("position", normal_02, (self.last + self.side**2, self.width))
        x += resampled(position[self.last :], grid).astype(x.dtype)
        if classify:
            token = self.param("class_token", normal_02, (self.width,)) + position[0]
            token = jnp.broadcast_to(token.astype(x.dtype), (b, 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        for i, block in enumerate(self.blocks):
            x = block(grid=grid, name=f"block{i}")(x, train)
        if classify:
            return nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm")(x[:, 0])
        return x.reshape(b, *grid, self.width)  # [b, n, d] -> [b, u, v, d]


class OverlapStage(nn.Module):
    """Patches, blocks and norm of PVTv2: [b, h, w, c] -> [b, u, v, d]."""

    width: int
    stride: int
    blocks: tuple[Callable[..., nn.Module], ...]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        patch = 2 * self.stride - 1  # 7 of stride 4, 3 of stride 2
        x = Conv(self.width, patch, self.stride, use_bias=True, **FAN_OUT, dtype=self.dtype, name="embed")(x)
        b, u, v, d = x.shape
        x = nn.LayerNorm(EMBED_EPSILON, dtype=self.dtype, name="embed_norm")(x.reshape(b, u * v, d))
        for i, block in enumerate(self.blocks):
            x = block(grid=(u, v), name=f"block{i}")(x, train)
        return nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm")(x).reshape(b, u, v, d)


class Block(nn.Module):
    """Pre-norm transformer block with spatial-reduction attention: [b, n, d] -> [b, n, d]."""

    width: int
    num_heads: int
    hidden: int
    grid: tuple[int, int]
    reduction: int
    real_heads: float
    hallucinate: str  # one of HALLUCINATE
    attention_impl: str  # one of CHOICES
    compact: Compact
    drop_path: float
    dtype: Dtype
    convolutional: bool = False  # PVTv2's
    pool_size: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        attention = SpatialReductionAttention(
            self.width,
            self.num_heads,
            self.grid,
            self.reduction,
            self.pool_size,
            self.real_heads,
            self.hallucinate,
            self.attention_impl,
            **(FAN_OUT if self.convolutional else {}),
            dtype=self.dtype,
            name="attention",
        )
        shape = {"width": self.width, "hidden": self.hidden, "compact": self.compact, "dtype": self.dtype}
        if self.convolutional:
            ffn = ConvMlp(**shape, grid=self.grid, relu=self.pool_size > 0, name="ffn")
        else:
            ffn = Mlp(**shape, name="ffn")
        drop = DropPath(self.drop_path, name="drop_path")
        x = x + drop(attention(nn.LayerNorm(EPSILON, dtype=self.dtype, name="attention_norm")(x)), train=train)
        x = x + drop(ffn(nn.LayerNorm(EPSILON, dtype=self.dtype, name="ffn_norm")(x), train=train), train=train)
        keep(self, "hidden", x)
        return x


class ConvMlp(nn.Module):
    """W2 gelu(depthwise 3x3 convolution(W1 x + b1)) + b2 on the tokens of a map: [b, n, d] -> [b, n, d].

    Of linear attention's blocks with a ReLU before the convolution. The second matrix may be compact.
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
