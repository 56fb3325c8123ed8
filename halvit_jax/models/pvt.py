"""Pyramid Vision Transformer (PVT), and the base class of PVTv2 (`models.pvt_v2`).

Wenhai Wang, Enze Xie, Xiang Li, Deng-Ping Fan, Kaitao Song, Ding Liang, Tong Lu, Ping Luo, Ling Shao, "Pyramid Vision
Transformer: A Versatile Backbone for Dense Prediction without Convolutions", ICCV 2021,
https://arxiv.org/abs/2102.12122.

    x = norm(patches of the map before) + position;  x += attention over fewer keys(norm(x));  x += ffn(norm(x));  ...

in each stage. The classifier reads a class token of the last one.

Shapes: `b` batch, `h w` height and width of a stage's input, `u v` of its map, `n` tokens, `d` width.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.batch_norm import norms_in_evaluation
from halvit_jax.layers.block import PreNormBlock
from halvit_jax.layers.drop import stage_rates
from halvit_jax.layers.embed import PatchEmbed, resampled
from halvit_jax.layers.ffn import Compact, Mlp, fold
from halvit_jax.layers.fused_attention import CHOICES
from halvit_jax.layers.initializers import Dtype, normal_02
from halvit_jax.layers.remat import run_block
from halvit_jax.layers.spatial_reduction import SpatialReductionAttention
from halvit_jax.models.family import Family, Fields, Published
from halvit_jax.models.partition import COLUMNS, FILTERS, ROWS, SPLIT, VECTORS
from halvit_jax.models.validation import check_channels, check_choice, check_compact, check_divides, check_rate
from halvit_jax.models.vit import HC

EPSILON = 1e-6  # of the LayerNorms in blocks and at the end of stages
EMBED_EPSILON = 1e-5  # of those of patches


class Pyramid(nn.Module):
    """Stages of transformer blocks, each on a smaller and wider map: the base of PVT and PVTv2.

    `__call__(images, train=...)` takes normalised images [b, h, w, 3] to float32 logits [b, num_classes], or to pooled
    features [b, d] when `num_classes` is 0.

    Args:
        num_classes: size of the head; 0 leaves it out.
        image_size: height and width of the images.
        in_channels: channels of the images: 3 of colour, 1 of grey ones.
        strides: of each stage's map against the one before.
        widths: of each stage's tokens.
        depths: blocks in each stage.
        head_width: of one attention head, in all stages.
        ffn_ratios: hidden width / width of each stage's feed-forward layers.
        reductions: side of the square of tokens that becomes one key, in each stage.
        real_heads, hallucinate: see `AttentionMaps`.
        attention_impl: see `attend`.
        ffn_rank, ffn_branches: see `CompactDense`.
        drop_path: stochastic depth of the last block; the others' rates rise to it linearly from 0.
        remat: recompute each block in the backward pass instead of keeping its activations.
        residual_float32: keep the sums of the residual branches in float32 while the branches compute in `dtype`.
        dtype: the type to compute in. Parameters, softmax and head are always float32.
        folded: for inference only, with the variables of `layers.ffn.fold`.
    """

    num_classes: int = 1000
    image_size: int = 224
    in_channels: int = 3
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
    residual_float32: bool = False
    dtype: Dtype = jnp.float32
    folded: bool = False

    def __post_init__(self) -> None:
        for field in ("depths", "strides", "widths", "ffn_ratios", "reductions"):
            values = tuple(getattr(self, field))
            if not values or len(values) != len(self.depths):
                raise ValueError(f"model.{field}={values} must have a value for each stage of model.depths")
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
        check_rate("drop_path", self.drop_path)
        super().__post_init__()

    def setup(self) -> None:
        self.stages = [self._stage(i) for i in range(len(self.depths))]
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, kernel_init=normal_02, dtype=jnp.float32)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = self._pooled(images, train)
        return self.head(x) if self.num_classes else x

    def features(self, images: jax.Array, *, train: bool, frozen_norms: bool = False) -> dict[int, jax.Array]:
        """The outputs of the stages, for detectors: {4: [b, h/4, w/4, d], 8: [b, h/8, w/8, d], ...}."""
        check_channels(images, self.in_channels)
        maps, x = {}, images
        with norms_in_evaluation(frozen_norms):
            for i, stage in enumerate(self.stages):
                x = maps[math.prod(self.strides[: i + 1])] = stage(x, train=train)
        return maps

    def _stage(self, i: int) -> nn.Module:
        """Stage i, counted from 0."""
        raise NotImplementedError

    def _pooled(self, images: jax.Array, train: bool) -> jax.Array:
        """The input of the classifier, [b, d] in float32."""
        raise NotImplementedError

    def _blocks(
        self, i: int, ffn: Callable[..., nn.Module], *, convolutional: bool, **attention: Any
    ) -> Callable[..., jax.Array]:
        """`run_blocks` of stage i, with these further fields of its attention."""
        width = self.widths[i]
        common = {"width": width, "dtype": self.dtype}
        attention |= {
            "num_heads": width // self.head_width,
            "reduction": self.reductions[i],
            "real_heads": self.real_heads,
            "hallucinate": self.hallucinate,
            "attention_impl": self.attention_impl,
        }
        compact = Compact(self.ffn_rank, self.ffn_branches, self.folded)
        return functools.partial(
            run_blocks,
            attention=functools.partial(SpatialReductionAttention, **common, **attention),
            ffn=functools.partial(ffn, **common, hidden=round(width * self.ffn_ratios[i]), compact=compact),
            convolutional=convolutional,
            rates=stage_rates(self.drop_path, self.depths)[i],
            remat=self.remat,
            residual_float32=self.residual_float32,
            dtype=self.dtype,
        )


class PVT(Pyramid):
    """Patches that do not overlap, learned positions, and a class token in the last stage, which has no reduction.

    The maps of `features` are not normalised, and their last stage runs without the class token. Images may have any
    size that the product of `strides` divides; positions are resampled to it. `ffn_impl`: see
    `layers.ffn.implementation`.
    """

    ffn_impl: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ffn_impl", self.ffn_impl, CHOICES)
        check_divides("strides", math.prod(self.strides), "image_size", self.image_size)
        if self.reductions[-1] != 1:
            raise ValueError(f"model.reductions={tuple(self.reductions)} must end in 1: a class token is on no map")

    def _stage(self, i: int) -> nn.Module:
        side, last = self.image_size // math.prod(self.strides[: i + 1]), i == len(self.depths) - 1
        blocks = self._blocks(i, functools.partial(Mlp, ffn_impl=self.ffn_impl), convolutional=False)
        return Stage(self.widths[i], self.strides[i], side, last, blocks, self.dtype, name=f"stage{i + 1}")

    def _pooled(self, images: jax.Array, train: bool) -> jax.Array:
        check_channels(images, self.in_channels)
        *first, last = self.stages
        for stage in first:
            images = stage(images, train=train)
        return last(images, train=train, classify=True).astype(jnp.float32)


def run_blocks(
    x: jax.Array,
    grid: tuple[int, int],
    *,
    attention: Callable[..., nn.Module],
    ffn: Callable[..., nn.Module],
    convolutional: bool,
    rates: Sequence[float],
    remat: bool,
    residual_float32: bool,
    dtype: Dtype,
    train: bool,
) -> jax.Array:
    """Run the blocks of a stage on tokens [b, n, d]; the last of them are those of the grid.

    `attention` and, if `convolutional`, `ffn` get the grid here.
    """
    attention = functools.partial(attention, grid=grid)
    ffn = functools.partial(ffn, grid=grid) if convolutional else ffn
    x = x.astype(jnp.float32) if residual_float32 else x
    for i, rate in enumerate(rates):
        block = PreNormBlock(attention, ffn, EPSILON, rate, dtype, name=f"block{i}")
        x = run_block(block, x, remat=remat, train=train)
    return x


class Stage(nn.Module):
    """Patches, positions and blocks of PVT: [b, h, w, c] -> [b, u, v, d]; with `classify` -> class token [b, d]."""

    width: int
    stride: int
    side: int  # of the map of the position table
    last: bool  # has a class token and a norm
    blocks: Callable[..., jax.Array]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, classify: bool = False) -> jax.Array:
        b, h, w, _ = x.shape
        grid, side = (h // self.stride, w // self.stride), (self.side, self.side)
        x = PatchEmbed(self.width, self.stride, dtype=self.dtype, name="embed")(x)  # [b, n, d]
        x = nn.LayerNorm(EMBED_EPSILON, dtype=self.dtype, name="embed_norm")(x)
        position = self.param("position", normal_02, (self.last + self.side**2, self.width))
        # Bilinear as in PVT's detectors.
        moved = resampled(position, side, grid, method="linear", antialias=False)[self.last :]
        x += moved.astype(x.dtype)[None]
        if classify:
            token = self.param("class_token", normal_02, (self.width,)) + position[0]
            token = jnp.broadcast_to(token.astype(x.dtype), (b, 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        x = self.blocks(x, grid, train=train)
        if classify:
            return nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm")(x[:, 0])
        return x.reshape(b, *grid, self.width)  # [b, n, d] -> [b, u, v, d]


SMALL, MEDIUM, LARGE = ({"depths": depths} for depths in ((3, 4, 6, 3), (3, 4, 18, 3), (3, 8, 27, 3)))
SIZES: dict[str, Fields] = {
    "pvt_tiny": {},
    "pvt_small": SMALL,
    "pvt_medium": MEDIUM,
    "pvt_large": LARGE,
    "pvt_tiny_hc": HC,
    "pvt_small_hc": SMALL | HC,
    "pvt_medium_hc": MEDIUM | HC,
    "pvt_large_hc": LARGE | HC,
}
PARTITION_RULES = (
    (r"(query|key_value|expand|head|second\d?(/dense)?)/kernel$", COLUMNS),
    (r"(output|reduce|first\d?(/dense)?)/kernel$", ROWS),
    (r"depthwise/kernel$", (None, None, None, SPLIT)),  # as the matrix before it
    (r"(embed|reduction)/kernel$", FILTERS),
    VECTORS,
)
TRANSFER_RULES = ((r"^head/", "head"), (r"/position$", "position_grid"), (r"^stage1/embed/kernel$", "input_channels"))
TINY_SHAPE = {
    "strides": (4, 2),
    "widths": (16, 24),
    "depths": (1, 1),
    "head_width": 8,
    "ffn_ratios": (2, 2),
    "reductions": (2, 1),
    "image_size": 32,
}
FAMILY = Family(
    model=PVT,
    sizes=SIZES,
    partition_rules=PARTITION_RULES,
    transfer_rules=TRANSFER_RULES,
    tiny=TINY_SHAPE,
    fold=fold,
    published={
        "pvt_tiny": Published(75.1, "PVT, 300 epochs"),
        "pvt_small": Published(79.8, "PVT, 300 epochs"),
        "pvt_medium": Published(81.2, "PVT, 300 epochs"),
        "pvt_large": Published(81.7, "PVT, 300 epochs"),
    },
    baselines={f"{name}_hc": name for name in ("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large")},
)
