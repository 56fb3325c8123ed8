"""Swin Transformer: stages of blocks with attention in windows.

Ze Liu, Yutong Lin, Yue Cao, Han Hu, Yixuan Wei, Zheng Zhang, Stephen Lin, Baining Guo, "Swin Transformer: Hierarchical
Vision Transformer using Shifted Windows", ICCV 2021, https://arxiv.org/abs/2103.14030.

    x += attention_in_windows(norm(x));  x += ffn(norm(x));  ...;  logits = head(norm(x) averaged over the map)

Shapes: `b` batch, `u v` height and width of a map, `d` width of its tokens.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.attention import ATTENTION
from halvit_jax.layers.batch_norm import norms_in_evaluation
from halvit_jax.layers.drop import DropPath, stage_rates
from halvit_jax.layers.embed import PatchEmbed
from halvit_jax.layers.ffn import FFN
from halvit_jax.layers.fused_attention import CHOICES
from halvit_jax.layers.initializers import Dtype, normal_02
from halvit_jax.layers.remat import run_block
from halvit_jax.layers.sow import sow
from halvit_jax.layers.window import RelativePositionBias, Windows
from halvit_jax.models.family import Family, Fields, Published
from halvit_jax.models.partition import COLUMNS, FILTERS, ROWS, VECTORS
from halvit_jax.models.validation import check_channels, check_choice, check_divides, check_rate

EPSILON = 1e-5  # of every LayerNorm


class SwinTransformer(nn.Module):
    """Patches, then stages at half the resolution and twice the width of the one before.

    `__call__(images, train=...)` takes normalised images [b, h, w, 3] to float32 logits [b, num_classes], or to pooled
    features [b, d] when `num_classes` is 0. Images may have any size that `patch_size` divides; maps are padded to
    whole windows and to whole squares of 2 x 2 tokens.

    Args:
        num_classes: size of the head; 0 leaves it out.
        image_size: of the recipe's images. A stage with a map no larger than `window_size` has one window of the map's
            size, and so a smaller table of relative positions.
        in_channels: channels of the images: 3 of colour, 1 of grey ones.
        patch_size: the stride of the first stage.
        width: of the first stage's tokens.
        depths: blocks in each stage; every second one of a stage is shifted.
        head_width: of one attention head, in all stages.
        window_size: side of a window, in tokens; 12 for images of 384.
        ffn_ratio: hidden width / width of the feed-forward layers.
        attention: a key of ATTENTION: the reference's "full", or "tied" (then `attention_bias` is False in HaLViT).
        ffn: a key of FFN: the reference's "dense", or "tied".
        ffn_impl: see `layers.ffn.implementation`.
        attention_bias: biases of queries, keys, values and output.
        drop_path: stochastic depth of the last block; the others' rates rise to it linearly from 0.
        remat: recompute each block in the backward pass instead of keeping its activations.
        residual_float32: keep the sums of the residual branches in float32 while the branches compute in `dtype`.
        dtype: the type to compute in. Parameters, softmax and head are always float32.
    """

    num_classes: int = 1000
    image_size: int = 224
    in_channels: int = 3
    patch_size: int = 4
    width: int = 96
    depths: Sequence[int] = (2, 2, 6, 2)
    head_width: int = 32
    window_size: int = 7
    ffn_ratio: float = 4.0
    attention: str = "full"
    ffn: str = "dense"
    ffn_impl: str = "auto"
    attention_bias: bool = True
    drop_path: float = 0.0
    remat: bool = False
    residual_float32: bool = False
    dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        check_choice("attention", self.attention, ATTENTION)
        check_choice("ffn", self.ffn, FFN)
        check_choice("ffn_impl", self.ffn_impl, CHOICES)
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"model.depths={tuple(self.depths)} must be one stage or more, each of at least 1 block")
        check_divides("head_width", self.head_width, "width", self.width)
        check_divides("patch_size", self.patch_size, "image_size", self.image_size)
        if self.window_size < 1:
            raise ValueError(f"model.window_size={self.window_size} must be at least 1")
        if self.width * self.ffn_ratio < 1:
            raise ValueError(f"model.ffn_ratio={self.ffn_ratio} leaves nothing of model.width={self.width}")
        check_rate("drop_path", self.drop_path)
        super().__post_init__()

    def setup(self) -> None:
        self.embed = PatchEmbed(self.width, self.patch_size, dtype=self.dtype)
        self.embed_norm = nn.LayerNorm(EPSILON, dtype=self.dtype)
        for i, rates in enumerate(stage_rates(self.drop_path, self.depths)):
            setattr(self, f"stage{i + 1}", self._stage(i, rates))
        self.norm = nn.LayerNorm(EPSILON, dtype=self.dtype)
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, kernel_init=normal_02, dtype=jnp.float32)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        maps = self.features(images, train=train)
        x = self.norm(maps[max(maps)]).mean((1, 2), dtype=jnp.float32)
        return self.head(x) if self.num_classes else x

    def features(self, images: jax.Array, *, train: bool, frozen_norms: bool = False) -> dict[int, jax.Array]:
        """The outputs of the stages, not normalised: {4: [b, h/4, w/4, d], 8: [b, h/8, w/8, 2 d], ...}."""
        check_channels(images, self.in_channels)
        b, height, width, _ = images.shape
        p, maps = self.patch_size, {}
        with norms_in_evaluation(frozen_norms):
            x = self.embed_norm(self.embed(images)).reshape(b, height // p, width // p, self.width)
            x = x.astype(jnp.float32) if self.residual_float32 else x
            for i in range(len(self.depths)):
                x = maps[p * 2**i] = getattr(self, f"stage{i + 1}")(x, train=train)
        return maps

    def _stage(self, stage: int, rates: tuple[float, ...]) -> nn.Module:
        make = functools.partial(SwinBlock, **self._shape(stage))
        blocks = [functools.partial(make, shifted=i % 2 == 1, drop_path=rate) for i, rate in enumerate(rates)]
        return Stage(stage > 0, tuple(blocks), self.remat, self.dtype)

    def _shape(self, stage: int) -> dict[str, Any]:
        """Fields common to the blocks of a stage."""
        width, map_size = self.width * 2**stage, self.image_size // self.patch_size
        for _ in range(stage):
            map_size = -(-map_size // 2)
        heads = width // self.head_width
        attention, ffn = ATTENTION[self.attention], FFN[self.ffn]
        hidden, chosen = round(width * self.ffn_ratio), {"ffn_impl": self.ffn_impl, "dtype": self.dtype}
        return {
            "attention": functools.partial(attention, width, heads, bias=self.attention_bias, dtype=self.dtype),
            "ffn": functools.partial(ffn, width, hidden, **chosen),
            "num_heads": heads,
            "window": min(self.window_size, map_size),
            "dtype": self.dtype,
        }


class Stage(nn.Module):
    """Blocks, after a merging of patches in all stages but the first: [b, u, v, d] -> the same or halved."""

    merge: bool
    blocks: tuple[Callable[..., nn.Module], ...]
    remat: bool  # of each block
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if self.merge:
            x = PatchMerging(self.dtype, name="merge")(x).astype(x.dtype)  # the residual's
        for i, block in enumerate(self.blocks):
            x = run_block(block(name=f"block{i}"), x, remat=self.remat, train=train)
        return x


class PatchMerging(nn.Module):
    """2 x 2 tokens become one of twice the width, W norm([x00, x10, x01, x11]): [b, u, v, d] -> [b, u/2, v/2, 2 d]."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        b, u, v, d = x.shape
        x = x.reshape(b, u // 2, 2, v // 2, 2, d).transpose(0, 1, 3, 4, 2, 5).reshape(b, u // 2, v // 2, 4 * d)
        x = nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm")(x)
        return nn.Dense(2 * d, use_bias=False, kernel_init=normal_02, dtype=self.dtype, name="reduce")(x)


class SwinBlock(nn.Module):
    """Pre-norm transformer block with attention in windows of the map: [b, u, v, d] -> [b, u, v, d]."""

    attention: Callable[..., nn.Module]  # as in PreNormBlock
    ffn: Callable[..., nn.Module]
    num_heads: int
    window: int
    dtype: Dtype
    shifted: bool
    drop_path: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        grid = x.shape[1:3]
        windows = Windows(grid, self.window, half_window(grid, self.window) if self.shifted else 0)
        position_bias = RelativePositionBias(self.window, self.num_heads, name="position_bias")
        norm = functools.partial(nn.LayerNorm, EPSILON, dtype=self.dtype)
        drop = DropPath(self.drop_path, name="drop_path")

        def logits_fn(logits: jax.Array, query: jax.Array) -> jax.Array:
            del query
            return windows.mask(logits + position_bias().astype(logits.dtype)[None])

        y = self.attention(name="attention")(windows.split(norm(name="attention_norm")(x)), logits_fn=logits_fn)
        x = x + drop(windows.join(y), train=train).astype(x.dtype)
        x = x + drop(self.ffn(name="ffn")(norm(name="ffn_norm")(x), train=train), train=train).astype(x.dtype)
        sow(self, "hidden", x)
        return x


def half_window(grid: tuple[int, ...], window: int) -> int:
    """The shift in tokens: half a window, or 0 if the map is a single window in a direction."""
    return window // 2 if min(grid) > window else 0


SMALL = {"depths": (2, 2, 18, 2)}
SIZES: dict[str, Fields] = {
    "swin_tiny": {},
    "swin_small": SMALL,
    "swin_base": SMALL | {"width": 128},
}

PARTITION_RULES = (
    (r"(qkv|expand|head|tied|query_output|key_value)/kernel$", COLUMNS),
    (r"(output|reduce)/kernel$", ROWS),
    (r"embed/kernel$", FILTERS),
    VECTORS,
)
TRANSFER_RULES = (
    (r"^head/", "head"),
    (r"position_bias/table$", "position_grid"),
    (r"^embed/kernel$", "input_channels"),
)

FAMILY = Family(
    model=SwinTransformer,
    sizes=SIZES,
    partition_rules=PARTITION_RULES,
    transfer_rules=TRANSFER_RULES,
    tiny={"width": 32, "depths": (2, 2), "head_width": 16, "window_size": 4, "image_size": 32},
    feature_norms=True,
    published={
        "swin_tiny": Published(81.3, "Swin Transformer, 300 epochs"),
        "swin_small": Published(83.0, "Swin Transformer, 300 epochs"),
        "swin_base": Published(83.5, "Swin Transformer, 300 epochs"),
    },
)
