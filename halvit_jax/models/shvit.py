"""SHViT: a convolutional network with single-head attention on a part of the channels in its later stages.

Seokju Yun, Youngmin Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", CVPR 2024,
https://arxiv.org/abs/2401.16456, as the authors released it (github.com/ysj9909/SHViT). A stem of strided convolutions
reduces the image to few tokens, and three stages reduce them further:

    x += norm(depthwise(x));  x += attention(x), in stages of kind "s";  x += ffn(x)

A batch normalisation follows every convolution. There is no position embedding and no class token.

Shapes: `b` batch, `h w` space, `c` channels.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from halvit_jax.layers import batch_norm
from halvit_jax.layers.arrays import wide_type
from halvit_jax.layers.attention import SingleHeadAttention
from halvit_jax.layers.batch_norm import BatchNorm, norms_in_evaluation
from halvit_jax.layers.conv import ConvNorm, SqueezeExcite
from halvit_jax.layers.initializers import Dtype, Initializer, normal_02
from halvit_jax.layers.remat import run_block
from halvit_jax.models.family import Family, Fields, Published
from halvit_jax.models.partition import COLUMNS, FILTERS, VECTORS
from halvit_jax.models.validation import check_channels, check_choice

KINDS = {"i": False, "s": True}  # kind of stage -> its blocks have attention
zeros, ones = nn.initializers.zeros, nn.initializers.ones


class SHViT(nn.Module):
    """Stages of blocks between a stem of 3x3 convolutions and a classifier on the mean of the last map.

    The published models train without stochastic depth and dropout, so these have no fields. Their printed sizes and
    multiply-accumulates are those of the folded network (`models.fold`).

    Args:
        depths: blocks of each stage, without those around a merging of patches.
        widths: channels of each stage.
        partial_dims: attention channels of each stage; not used in one of kind "i".
        stages: kind of each stage, a key of KINDS: "i" without attention, "s" with it.
        stem_strides: stride of each convolution of the stem; their channels double from one to the next.
        num_classes: size of the head; 0 leaves it out and returns the pooled features.
        distilled: a second classifier, trained on the teacher's predictions; the logits are the mean of both.
        image_size: of the recipe's images; the network runs at any size.
        in_channels: channels of the images: 3 of colour, 1 of grey ones.
        remat: recompute each block in the backward pass instead of keeping its activations.
        dtype: the type to compute in. Parameters, statistics, softmax, classifiers and logits are float32.
        folded: for inference only, with the variables of `fold`.
    """

    depths: Sequence[int] = (2, 4, 5)
    widths: Sequence[int] = (128, 224, 320)
    partial_dims: Sequence[int] = (32, 48, 68)
    stages: Sequence[str] = ("i", "s", "s")
    stem_strides: Sequence[int] = (2, 2, 2, 2)
    num_classes: int = 1000
    distilled: bool = False
    image_size: int = 224
    in_channels: int = 3
    remat: bool = False
    dtype: Dtype = None
    folded: bool = False

    def __post_init__(self) -> None:
        fields = {name: tuple(getattr(self, name)) for name in ("depths", "widths", "partial_dims", "stages")}
        if len({len(values) for values in fields.values()}) != 1 or not self.stages:
            given = ", ".join(f"model.{name}={values}" for name, values in fields.items())
            raise ValueError(f"{given} must have one entry for each stage")
        for kind in self.stages:
            check_choice("stages", kind, KINDS)
        for name in ("depths", "stem_strides"):
            values = tuple(getattr(self, name))
            if min(values, default=0) < 1:
                raise ValueError(f"model.{name}={values} must all be at least 1, and there must be one")
        for width, partial, kind in zip(self.widths, self.partial_dims, self.stages, strict=True):
            if KINDS[kind] and not 1 <= partial <= width:
                raise ValueError(f"model.partial_dims={partial} in a stage of model.widths {width}; give 1 to {width}")
        halvings = 2 ** (len(self.stem_strides) - 1)
        if self.widths[0] < 1 or self.widths[0] % halvings:
            raise ValueError(
                f"model.widths[0]={self.widths[0]} must be a multiple of {halvings}, because each convolution of "
                f"model.stem_strides={tuple(self.stem_strides)} but the last halves it"
            )
        super().__post_init__()

    def setup(self) -> None:
        common = {"dtype": self.dtype, "folded": self.folded}
        self.stem = Stem(self.widths[0], tuple(self.stem_strides), **common)
        for i, (depth, width, kind) in enumerate(zip(self.depths, self.widths, self.stages, strict=True)):
            partial = self.partial_dims[i] if KINDS[kind] else 0
            stage = Stage(depth, width, partial, merges=i > 0, remat=self.remat, **common)
            setattr(self, f"stage{i + 1}", stage)
        if self.num_classes:
            self.head = Head(self.num_classes, self.folded)
            if self.distilled:
                self.head_distill = Head(self.num_classes, self.folded)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Normalised images [b, h, w, 3] -> float32 logits [b, num_classes], or pooled features [b, c]."""
        logits = self.head_logits(images, train=train)
        return (logits["class"] + logits["distill"]) / 2 if "distill" in logits else logits["class"]

    def head_logits(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """The logits of each classifier: {"class": float32 [b, num_classes]}, and "distill" if distilled.

        With `num_classes` 0, {"class": pooled features [b, c]}.
        """
        maps = self.features(images, train=train)
        last = maps[max(maps)]
        # At least float32 from here: it costs nothing and the loss reads it.
        pooled = last.mean((1, 2), dtype=wide_type(last))
        if not self.num_classes:
            return {"class": pooled}
        out = {"class": self.head(pooled, train=train)}
        if self.distilled:
            out["distill"] = self.head_distill(pooled, train=train)
        return out

    def features(self, images: jax.Array, *, train: bool, frozen_norms: bool = False) -> dict[int, jax.Array]:
        """The outputs of the stages: {16: [b, h/16, w/16, c], 32: ..., 64: ...} with the usual stem."""
        stride, maps = math.prod(self.stem_strides), {}
        with norms_in_evaluation(frozen_norms):
            check_channels(images, self.in_channels)
            x = self.stem(images, train=train)
            for i in range(len(self.stages)):
                x = maps[stride * 2**i] = getattr(self, f"stage{i + 1}")(x, train=train)
        return maps


class Stem(nn.Module):
    """3x3 convolutions with ReLUs between them: [b, h, w, 3] -> [b, h/s, w/s, width], s the product of the strides."""

    width: int
    strides: tuple[int, ...]
    dtype: Dtype
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        last = len(self.strides) - 1
        for i, stride in enumerate(self.strides):
            width = self.width // 2 ** (last - i)
            x = ConvNorm(width, 3, stride, dtype=self.dtype, folded=self.folded, name=f"conv{i}")(x, train=train)
            x = nn.relu(x) if i < last else x
        return x


class Stage(nn.Module):
    """Blocks; with `merges`, after a merging between two more blocks: [b, h, w, c] -> [b, h/2, w/2, width]."""

    depth: int
    width: int
    partial: int  # attention channels; 0: no attention
    merges: bool
    remat: bool
    dtype: Dtype
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        common = {"dtype": self.dtype, "folded": self.folded}
        run = functools.partial(run_block, remat=self.remat, train=train)
        if self.merges:
            # The norms of depthwise convolutions are initialised to 1 here and to 0 elsewhere.
            x = run(Block(partial=0, local_init=ones, **common, name="before"), x)
            x = run(Merge(self.width, **common, name="merge"), x)
            x = run(Block(partial=0, local_init=ones, **common, name="after"), x)
        for i in range(self.depth):
            x = run(Block(partial=self.partial, local_init=zeros, **common, name=f"block{i}"), x)
        return x


class Block(nn.Module):
    """A depthwise 3x3 convolution, attention and a feed-forward layer, each with its shortcut: [b, h, w, c] -> same."""

    partial: int
    local_init: Initializer  # of the scale of the depthwise convolution's norm
    dtype: Dtype
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        width, common = x.shape[-1], {"dtype": self.dtype, "folded": self.folded}
        local = ConvNorm(width, 3, groups=width, scale_init=self.local_init, **common, name="local")(x, train=train)
        x = local if self.folded else x + local  # `fold` merges the shortcut into the kernel
        if self.partial:
            x = x + SingleHeadAttention(self.partial, **common, name="attention")(x, train=train)
        return x + ConvMlp(**common, name="ffn")(x, train=train)


class ConvMlp(nn.Module):
    """norm(relu(norm(x W1)) W2), of hidden width 2 c: [b, h, w, c] -> [b, h, w, c]."""

    dtype: Dtype
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = functools.partial(ConvNorm, dtype=self.dtype, folded=self.folded)
        y = nn.relu(norm(2 * x.shape[-1], name="expand")(x, train=train))
        return norm(x.shape[-1], scale_init=zeros, name="reduce")(y, train=train)


class Merge(nn.Module):
    """An inverted bottleneck of stride 2 with squeeze-excite, without a shortcut: [b, h, w, c] -> [b, h/2, w/2, width].

    A 1x1 to 4 c, a depthwise 3x3 and a 1x1 convolution.
    """

    width: int
    dtype: Dtype
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = functools.partial(ConvNorm, dtype=self.dtype, folded=self.folded)
        channels, inside = x.shape[-1], 4 * x.shape[-1]
        y = nn.relu(norm(inside, name="expand")(x, train=train))
        y = nn.relu(norm(inside, 3, 2, groups=inside, name="stride")(y, train=train))
        y = SqueezeExcite(multiple_of_8(channels), dtype=self.dtype, name="excite")(y)
        return norm(self.width, name="reduce")(y, train=train)


class Head(nn.Module):
    """A batch normalisation and a matrix, in the input's type: [b, c] -> [b, classes]."""

    classes: int
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = BatchNorm(folded="merged" if self.folded else "", name="norm")(x, train=train)
        return nn.Dense(self.classes, kernel_init=normal_02, name="linear")(x)


def multiple_of_8(channels: int) -> int:
    """The multiple of 8 nearest to a number of channels, the upper one of two; at least 8."""
    return max((channels + 4) // 8 * 8, 8)


def fold(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the folded model: `layers.batch_norm.fold`, then the shortcuts and the classifiers' norms.

    x + local(x) is one depthwise convolution, `local` with 1 added to the centre of its kernel. A classifier's norm
    before its matrix, (scale * x + bias) W + b, is merged into both: diag(scale) W and bias W + b.
    """
    params = batch_norm.fold(variables)["params"]
    for name, module in params.items():
        if name.startswith("head"):
            norm, linear = module.pop("norm"), module["linear"]
            linear["bias"] = norm["bias"] @ linear["kernel"] + linear["bias"]
            linear["kernel"] = norm["scale"][:, None] * linear["kernel"]
        elif name.startswith("stage"):
            for block in module.values():
                if "local" in block:
                    block["local"]["conv"]["kernel"][1, 1] += 1
    return {"params": params}


SIZES: dict[str, Fields] = {
    "shvit_s1": {"depths": (2, 4, 5), "widths": (128, 224, 320), "partial_dims": (32, 48, 68)},
    "shvit_s2": {"depths": (2, 4, 5), "widths": (128, 308, 448), "partial_dims": (32, 66, 96)},
    "shvit_s3": {"depths": (3, 5, 5), "widths": (192, 352, 448), "partial_dims": (48, 75, 96)},
    "shvit_s4": {"depths": (4, 7, 6), "widths": (224, 336, 448), "partial_dims": (48, 72, 96), "image_size": 256},
}
SIZES |= {f"{name}_distilled": fields | {"distilled": True} for name, fields in SIZES.items()}

PARTITION_RULES = (
    (r"head(_distill)?/linear/kernel$", COLUMNS),
    (r"(conv|excite/(reduce|expand))/kernel$", FILTERS),
    VECTORS,
)
TRANSFER_RULES = ((r"^head(_distill)?/", "head"), (r"^stem/conv0/conv/kernel$", "input_channels"))

FAMILY = Family(
    model=SHViT,
    sizes=SIZES,
    partition_rules=PARTITION_RULES,
    transfer_rules=TRANSFER_RULES,
    neck="shvit",
    tiny={
        "depths": (1, 1),
        "widths": (16, 24),
        "partial_dims": (8, 8),
        "stages": ("i", "s"),
        "stem_strides": (2, 2),
        "image_size": 32,
    },
    fold=fold,
    published={
        "shvit_s1": Published(72.8, "SHViT, 300 epochs"),
        "shvit_s2": Published(75.2, "SHViT, 300 epochs"),
        "shvit_s3": Published(77.4, "SHViT, 300 epochs"),
        "shvit_s4": Published(79.4, "SHViT, 300 epochs"),
        "shvit_s1_distilled": Published(74.0, "SHViT, 300 epochs, distilled"),
        "shvit_s2_distilled": Published(76.2, "SHViT, 300 epochs, distilled"),
        "shvit_s3_distilled": Published(78.3, "SHViT, 300 epochs, distilled"),
        "shvit_s4_distilled": Published(80.2, "SHViT, 300 epochs, distilled"),
    },
)
