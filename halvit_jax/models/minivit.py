"""Mini-DeiT and Mini-Swin: consecutive layers share their matrices.

Jinnian Zhang, Houwen Peng, Kan Wu, Mengchen Liu, Bin Xiao, Jianlong Fu, Lu Yuan, "MiniViT: Compressing Vision
Transformers with Weight Multiplexing", CVPR 2022, https://arxiv.org/abs/2204.07154.

A block owns the matrices of its attention and its feed-forward layer and runs them several times in a row. Each run has
its own small arrays: norms, the mixing of heads before and after the softmax, relative positions (Mini-DeiT) and a
depthwise convolution (Mini-Swin). The shared kernels can themselves be tied (`attention="tied"`).

Shapes: `b` batch, `n` tokens, `u v` height and width of a map, `d` width.
"""

import functools
from collections.abc import Callable, Sequence

import jax
from flax import linen as nn

from halvit_jax.layers.attention import TalkingHeads
from halvit_jax.layers.conv import Conv
from halvit_jax.layers.drop import DropPath, linear_rates
from halvit_jax.layers.initializers import Dtype
from halvit_jax.layers.irpe import ContextualRelativePosition
from halvit_jax.layers.remat import run_block
from halvit_jax.layers.sow import sow
from halvit_jax.layers.window import RelativePositionBias, Windows
from halvit_jax.models import swin, vit
from halvit_jax.models.family import Family, Fields, Published
from halvit_jax.models.partition import FILTERS
from halvit_jax.models.validation import check_divides

LOCAL = 7  # side of Mini-Swin's depthwise convolution, whatever the window


class MiniDeit(vit.VisionTransformer):
    """A VisionTransformer that runs each block `share` times in a row; `depth` counts the runs.

    Every run has iRPE's relative positions and mixes the heads. The authors released models of `share` 2.
    """

    share: int = 2

    def __post_init__(self) -> None:
        check_divides("share", self.share, "depth", self.depth)
        if self.ffn_rank != 1.0:  # its norms would need separate statistics for each run
            raise ValueError(f"model.ffn_rank={self.ffn_rank} must be 1 where layers share matrices (model.share)")
        super().__post_init__()

    def _make_blocks(self) -> list[nn.Module]:
        rates = linear_rates(self.drop_path, self.depth)
        return [
            SharedBlock(
                self._attention(),
                self._ffn(),
                tuple(rates[first : first + self.share]),
                self.remat,
                self.dtype,
                name=f"block{first // self.share}",
            )
            for first in range(0, self.depth, self.share)
        ]

    def _run_blocks(self, x: jax.Array, grid: tuple[int, int], train: bool) -> jax.Array:
        for block in self.blocks:
            x = block(x, grid, train=train)
        return x


class SharedBlock(nn.Module):
    """Consecutive layers of Mini-DeiT with the same attention and feed-forward matrices: [b, n, d] -> [b, n, d]."""

    attention: Callable[..., nn.Module]  # as in PreNormBlock
    ffn: Callable[..., nn.Module]
    rates: tuple[float, ...]  # stochastic depth of each run
    remat: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int], *, train: bool) -> jax.Array:
        attention, ffn = self.attention(name="attention"), self.ffn(name="ffn")
        for i, rate in enumerate(self.rates):
            repeat = Repeat(attention, ffn, grid, rate, self.dtype, name=f"repeat{i}")
            x = run_block(repeat, x, remat=self.remat, train=train)
        return x


class Repeat(nn.Module):
    """One run of a SharedBlock's layers, with its own norms and mixing: [b, n, d] -> [b, n, d]."""

    attention: nn.Module  # the block's
    ffn: nn.Module  # the block's
    grid: tuple[int, int]
    drop_path: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        position = ContextualRelativePosition(name="position")
        mix_logits, mix_weights = TalkingHeads(False, name="mix_logits"), TalkingHeads(False, name="mix_weights")
        norm = functools.partial(nn.LayerNorm, vit.EPSILON, dtype=self.dtype)
        drop = DropPath(self.drop_path, name="drop_path")

        def logits_fn(logits: jax.Array, query: jax.Array) -> jax.Array:
            return mix_logits(logits + position(query, self.grid))

        y = norm(name="attention_norm")(x)
        x = x + drop(self.attention(y, logits_fn=logits_fn, weights_fn=mix_weights), train=train).astype(x.dtype)
        x = x + drop(self.ffn(norm(name="ffn_norm")(x), train=train), train=train).astype(x.dtype)
        sow(self, "hidden", x)
        return x


class MiniSwin(swin.SwinTransformer):
    """A SwinTransformer that runs each block `shares` times in a row, given per stage; `depths` counts the runs.

    Runs alternate between unshifted and shifted. Every run mixes the heads; between attention and feed-forward layer it
    replaces the tokens by their norm and adds a depthwise convolution of them.

    Args:
        shares: the runs of a block in each stage; divides the stage's depth.
        mask_unshifted: mask the unshifted runs like the shifted ones if a map has more than one window. The released
            networks were trained so and their weights need it, although the paper does not describe it.
    """

    shares: Sequence[int] = (2, 2, 2, 2)
    mask_unshifted: bool = True

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.depths):
            raise ValueError(
                f"model.shares={tuple(self.shares)} must have an entry for each stage of "
                f"model.depths={tuple(self.depths)}"
            )
        for share, depth in zip(self.shares, self.depths, strict=True):
            check_divides("shares", share, "depths", depth)
        super().__post_init__()

    def _stage(self, stage: int, rates: tuple[float, ...]) -> nn.Module:
        share, make = self.shares[stage], functools.partial(SharedSwinBlock, **self._shape(stage))
        make = functools.partial(make, mask_unshifted=self.mask_unshifted, remat=self.remat)
        blocks = [
            functools.partial(make, first=first, rates=rates[first : first + share])
            for first in range(0, len(rates), share)
        ]
        return swin.Stage(stage > 0, tuple(blocks), False, self.dtype)  # each run has its own remat


class SharedSwinBlock(nn.Module):
    """Consecutive layers of Mini-Swin with shared matrices and position biases: [b, u, v, d] -> [b, u, v, d]."""

    attention: Callable[..., nn.Module]  # as in PreNormBlock
    ffn: Callable[..., nn.Module]
    num_heads: int
    window: int
    dtype: Dtype
    first: int  # index of the first run in its stage; odd runs are shifted
    rates: tuple[float, ...]  # stochastic depth of each run
    mask_unshifted: bool
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        attention, ffn = self.attention(name="attention"), self.ffn(name="ffn")
        position_bias = RelativePositionBias(self.window, self.num_heads, name="position_bias")
        grid = x.shape[1:3]
        shifted = Windows(grid, self.window, swin.half_window(grid, self.window))
        for i, rate in enumerate(self.rates):
            windows = shifted if (self.first + i) % 2 else Windows(grid, self.window)
            masking = shifted if self.mask_unshifted else windows
            repeat = SwinRepeat(attention, position_bias, ffn, windows, masking, rate, self.dtype, name=f"repeat{i}")
            x = run_block(repeat, x, remat=self.remat, train=train)
        return x


class SwinRepeat(nn.Module):
    """One run of a SharedSwinBlock's layers, with its own norms, mixing and convolution: [b, u, v, d] -> the same."""

    attention: nn.Module  # the block's
    position_bias: RelativePositionBias  # the block's
    ffn: nn.Module  # the block's
    windows: Windows
    masking: Windows  # gives the mask
    drop_path: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        mix_logits, mix_weights = TalkingHeads(True, name="mix_logits"), TalkingHeads(True, name="mix_weights")
        drop = DropPath(self.drop_path, name="drop_path")
        norm = functools.partial(nn.LayerNorm, swin.EPSILON, dtype=self.dtype)

        def logits_fn(logits: jax.Array, query: jax.Array) -> jax.Array:
            del query
            return self.masking.mask(mix_logits(logits + self.position_bias().astype(logits.dtype)[None]))

        y = self.windows.split(norm(name="attention_norm")(x))
        y = self.attention(y, logits_fn=logits_fn, weights_fn=mix_weights)
        x = x + drop(self.windows.join(y), train=train).astype(x.dtype)
        x = nn.LayerNorm(swin.EPSILON, dtype=x.dtype, name="local_norm")(x)  # it is the residual from here on
        local_conv = Conv(x.shape[-1], LOCAL, groups=x.shape[-1], use_bias=True, dtype=self.dtype, name="local_conv")
        x = x + local_conv(x).astype(x.dtype)
        x = x + drop(self.ffn(norm(name="ffn_norm")(x), train=train), train=train).astype(x.dtype)
        sow(self, "hidden", x)
        return x


MEAN_POOL = {"pool": "mean"}  # Mini-DeiT has no class token
DEIT_SIZES: dict[str, Fields] = {
    "mini_deit_tiny": vit.TINY | MEAN_POOL,
    "mini_deit_small": vit.SMALL | MEAN_POOL,
    "mini_deit_base": vit.BASE | MEAN_POOL,
    "mini_halvit_tiny": vit.SMALL | vit.TIED | MEAN_POOL,  # tied matrices, shared by two layers: unpublished
    "mini_halvit_small": vit.BASE | vit.TIED | MEAN_POOL,
}
SWIN_SIZES: dict[str, Fields] = {
    "mini_swin_tiny": {"shares": (2, 2, 6, 2)},
    "mini_swin_small": swin.SMALL,
    "mini_swin_base": swin.SMALL | {"width": 128},
}

# The matrices as in the parents; of a repeat's own arrays only the convolution is large enough to be split.
PARTITION_RULES = ((r"mix_\w+/kernel$", ()), (r"local_conv/kernel$", FILTERS), *vit.PARTITION_RULES)

DEIT_FAMILY = Family(
    model=MiniDeit,
    sizes=DEIT_SIZES,
    partition_rules=PARTITION_RULES,
    transfer_rules=vit.TRANSFER_RULES,
    tiny=vit.FAMILY.tiny,
    published={
        "mini_deit_tiny": Published(73.0, "MiniViT, 300 epochs, distilled"),
        "mini_deit_small": Published(80.9, "MiniViT, 300 epochs, distilled"),
        "mini_deit_base": Published(83.2, "MiniViT, 300 epochs, distilled"),
    },
    baselines={
        "mini_deit_tiny": "deit_tiny",
        "mini_deit_small": "deit_small",
        "mini_deit_base": "deit_base",
        "mini_halvit_tiny": "deit_small",
        "mini_halvit_small": "deit_base",
    },
)
SWIN_FAMILY = Family(
    model=MiniSwin,
    sizes=SWIN_SIZES,
    partition_rules=PARTITION_RULES,
    transfer_rules=swin.TRANSFER_RULES,
    tiny=swin.FAMILY.tiny | {"shares": (2, 2)},
    published={
        "mini_swin_tiny": Published(81.3, "MiniViT, 300 epochs, distilled"),
        "mini_swin_small": Published(83.9, "MiniViT, 300 epochs, distilled"),
        "mini_swin_base": Published(84.5, "MiniViT, 300 epochs, distilled"),
    },
    baselines={name: name.removeprefix("mini_") for name in SWIN_SIZES},
)
