"""Next-ViT: stages of convolution blocks and a few transformer blocks.

Jiashi Li, Xin Xia, Wei Li, Huixia Li, Xing Wang, Xuefeng Xiao, Rui Wang, Min Zheng, Xin Pan, "Next-ViT: Next Generation
Vision Transformer for Efficient Deployment in Realistic Industrial Scenarios", 2022, https://arxiv.org/abs/2207.05501.

A stage repeats a few convolution blocks (NCB) and one transformer block (NTB); the first stage has only the former:

    convolution block:   x += local(x);                  x += ffn(norm(x))
    transformer block:   x += attention(norm(x));  y = norm(x W);  y += local(y);  x = [x, y];  x += ffn(norm(x))

`local` is a multi-head (grouped) convolution, MHCA; `attention` has fewer keys than queries, E-MHSA. All norms are
batch normalisations. There is no position embedding and no class token.

Shapes: `b` batch, `u v` height and width of a map, `d` its channels.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
from flax import linen as nn

from halvit_jax.layers.arrays import wide_type
from halvit_jax.layers.batch_norm import norms_in_evaluation
from halvit_jax.layers.conv import ConvNorm
from halvit_jax.layers.drop import stage_rates
from halvit_jax.layers.ffn import Compact, fold
from halvit_jax.layers.fused_attention import CHOICES
from halvit_jax.layers.initializers import Dtype, normal_02
from halvit_jax.layers.next_block import ATTENDING, ConvBlock, TransformerBlock, unfused_norm
from halvit_jax.layers.remat import run_block
from halvit_jax.models.family import Family, Fields, Published
from halvit_jax.models.partition import COLUMNS, FILTERS, ROWS, VECTORS
from halvit_jax.models.validation import check_channels, check_choice, check_compact, check_divides, check_rate
from halvit_jax.models.vit import HC


class NextViT(nn.Module):
    """Stages between a stem of 3x3 convolutions and a classifier on the mean of the last map, normalised.

    `__call__(images, train=...)` takes normalised images [b, h, w, 3] to float32 logits [b, num_classes], or to pooled
    features [b, d] when `num_classes` is 0.

    Args:
        num_classes: size of the head; 0 leaves it out.
        image_size: of the recipe's images; other sizes need maps with enough tokens to pool.
        in_channels: channels of the images: 3 of colour, 1 of grey ones.
        depths: blocks of each stage. All stages but the first halve the map in their first block.
        widths: channels of each stage's convolution blocks and of its attention. A transformer block adds a third.
        periods: one block in this many is a transformer block, counted back from the last of a stage; 0: none.
        reductions: of each stage's attention; its square of consecutive tokens is pooled to one key.
        stem_widths, stem_strides: of the stem's convolutions.
        head_width: channels of an attention head, and of a group of the 3x3 convolutions in the blocks.
        real_heads, hallucinate: see `AttentionMaps`.
        attention_impl: see `attend`.
        ffn_rank, ffn_branches: see `CompactDense`.
        drop_path: stochastic depth of the last block; the others' rates rise to it linearly from 0.
        remat: recompute each block in the backward pass instead of keeping its activations.
        dtype: the type to compute in. Parameters, statistics, softmax, head and logits are float32.
        folded: for inference only, with the variables of `models.fold`.
    """

    num_classes: int = 1000
    image_size: int = 224
    in_channels: int = 3
    depths: Sequence[int] = (3, 4, 10, 3)
    widths: Sequence[int] = (96, 192, 384, 768)
    periods: Sequence[int] = (0, 4, 5, 3)
    reductions: Sequence[int] = (8, 4, 2, 1)
    stem_widths: Sequence[int] = (64, 32, 64, 64)
    stem_strides: Sequence[int] = (2, 1, 1, 2)
    head_width: int = 32
    real_heads: float = 1.0
    hallucinate: str = "logits"
    attention_impl: str = "auto"
    ffn_rank: float = 1.0
    ffn_branches: int = 2
    drop_path: float = 0.0
    remat: bool = False
    dtype: Dtype = None
    folded: bool = False

    def __post_init__(self) -> None:
        self._check_lengths("a stage", "depths", "widths", "periods", "reductions")
        self._check_lengths("a convolution of the stem", "stem_widths", "stem_strides")
        for i, (width, period) in enumerate(zip(self.widths, self.periods, strict=True)):
            check_divides("head_width", self.head_width, f"widths[{i}]", width)
            if period < 0:
                raise ValueError(f"model.periods[{i}]={period} must not be negative; 0 means no transformer block")
            if period and width % (ATTENDING * self.head_width):
                raise ValueError(
                    f"model.widths[{i}]={width} must be a multiple of {ATTENDING} model.head_width="
                    f"{ATTENDING * self.head_width}, because model.periods[{i}]={period} adds transformer blocks"
                )
        check_choice("attention_impl", self.attention_impl, CHOICES)
        check_compact(self.real_heads, self.hallucinate, self.ffn_rank, self.ffn_branches)
        check_rate("drop_path", self.drop_path)
        super().__post_init__()

    def setup(self) -> None:
        self.stem = Stem(tuple(self.stem_widths), tuple(self.stem_strides), self.dtype, self.folded)
        for i, rates in enumerate(stage_rates(self.drop_path, self.depths)):
            setattr(self, f"stage{i + 1}", Stage(tuple(self._blocks(i, rates)), self.remat))
        self.norm = unfused_norm(self.dtype, self.folded)
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, kernel_init=normal_02)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        maps = self.features(images, train=train)
        x = self.norm(maps[max(maps)], train=train)
        # At least float32 from here: it costs nothing and the loss reads it.
        x = x.mean((1, 2), dtype=wide_type(x))
        return self.head(x) if self.num_classes else x

    def features(self, images: jax.Array, *, train: bool, frozen_norms: bool = False) -> dict[int, jax.Array]:
        """The outputs of the stages, not normalised: {4: [b, h/4, w/4, d], 8: [b, h/8, w/8, d], ...}."""
        stride, maps = math.prod(self.stem_strides), {}
        with norms_in_evaluation(frozen_norms):
            check_channels(images, self.in_channels)
            x = self.stem(images, train=train)
            for i in range(len(self.depths)):
                x = maps[stride * 2**i] = getattr(self, f"stage{i + 1}")(x, train=train)
        return maps

    def is_transformer_block(self, stage: int) -> list[bool]:
        """True for each block of a stage (from 0) that is a transformer block."""
        depth, period = self.depths[stage], self.periods[stage]
        return [period > 0 and (depth - 1 - i) % period == 0 for i in range(depth)]

    def _blocks(self, stage: int, rates: Sequence[float]) -> list[Callable[..., nn.Module]]:
        """The blocks of a stage, without their names."""
        common = {
            "width": self.widths[stage],
            "head_width": self.head_width,
            "compact": Compact(self.ffn_rank, self.ffn_branches, self.folded),
            "dtype": self.dtype,
        }
        attention = {
            "reduction": self.reductions[stage],
            "real_heads": self.real_heads,
            "hallucinate": self.hallucinate,
            "attention_impl": self.attention_impl,
        }
        blocks = []
        for i, (attends, rate) in enumerate(zip(self.is_transformer_block(stage), rates, strict=True)):
            kind, fields = (TransformerBlock, common | attention) if attends else (ConvBlock, common)
            blocks.append(functools.partial(kind, **fields, halve=stage > 0 and i == 0, drop_path=rate))
        return blocks

    def _check_lengths(self, whose: str, *names: str) -> None:
        """Raise a ValueError unless these fields have equally many entries, none of them below 1."""
        fields = {name: tuple(getattr(self, name)) for name in names}
        if len({len(values) for values in fields.values()}) != 1 or not fields[names[0]]:
            given = ", ".join(f"model.{name}={values}" for name, values in fields.items())
            raise ValueError(f"{given} must have one entry for each of {whose}")
        for name, values in fields.items():
            if name != "periods" and min(values) < 1:
                raise ValueError(f"model.{name}={values} must all be at least 1")


class Stem(nn.Module):
    """3x3 convolutions, each with its norm and a ReLU: [b, h, w, 3] -> [b, h/s, w/s, d], s the product of strides."""

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Dtype
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = functools.partial(ConvNorm, kernel_init=normal_02, dtype=self.dtype, folded=self.folded)
        for i, (width, stride) in enumerate(zip(self.widths, self.strides, strict=True)):
            x = nn.relu(norm(width, 3, stride, name=f"conv{i}")(x, train=train))
        return x


class Stage(nn.Module):
    """The blocks of a stage, one after the other."""

    blocks: tuple[Callable[..., nn.Module], ...]
    remat: bool  # of each block

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for i, block in enumerate(self.blocks):
            x = run_block(block(name=f"block{i}"), x, remat=self.remat, train=train)
        return x


BASE = {"depths": (3, 4, 20, 3)}
LARGE = {"depths": (3, 4, 30, 3)}
SIZES: dict[str, Fields] = {
    "nextvit_small": {},
    "nextvit_base": BASE,
    "nextvit_large": LARGE,
    "nextvit_small_hc": HC,
    "nextvit_base_hc": BASE | HC,
    "nextvit_large_hc": LARGE | HC,
}

PARTITION_RULES = (
    (r"(conv|local/output)/kernel$", FILTERS),
    (r"(query|key|value|expand|head|second\d*(/dense)?)/kernel$", COLUMNS),
    (r"(output|reduce|first\d*(/dense)?)/kernel$", ROWS),
    VECTORS,
)
TRANSFER_RULES = ((r"^head/", "head"), (r"^stem/conv0/conv/kernel$", "input_channels"))

FAMILY = Family(
    model=NextViT,
    sizes=SIZES,
    partition_rules=PARTITION_RULES,
    transfer_rules=TRANSFER_RULES,
    tiny={
        "depths": (1, 2),
        "widths": (16, 24),
        "periods": (0, 2),
        "reductions": (1, 2),
        "stem_widths": (8, 16),
        "stem_strides": (2, 2),
        "head_width": 8,
        "image_size": 32,
    },
    fold=fold,
    published={
        "nextvit_small": Published(82.5, "Next-ViT, 300 epochs"),
        "nextvit_base": Published(83.2, "Next-ViT, 300 epochs"),
        "nextvit_large": Published(83.6, "Next-ViT, 300 epochs"),
    },
    baselines={f"{name}_hc": name for name in ("nextvit_small", "nextvit_base", "nextvit_large")},
)
