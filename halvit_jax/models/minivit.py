"""Mini-DeiT and Mini-Swin: consecutive layers with the same matrices (MiniViT, Zhang et al., 2022, arXiv 2204.07154).

A block owns the matrices of its attention and its feed-forward layer and runs them several times in a row. What makes
one run differ from the next is small: norms, the mixing of heads before and after the softmax, relative positions
(Mini-DeiT) and a depthwise convolution (Mini-Swin). The shared kernels can themselves be tied (`attention="tied"`).

Shapes: `b` batch, `n` tokens, `u v` height and width of a map, `d` width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn

from halvit_jax.layers.attention import ATTENTION, HeadMix
from halvit_jax.layers.conv import Conv
from halvit_jax.layers.drop import DropPath, linear_rates
from halvit_jax.layers.ffn import FFN
from halvit_jax.layers.initializers import Dtype
from halvit_jax.layers.irpe import ContextualPosition
from halvit_jax.layers.sow import keep
from halvit_jax.layers.window import RelativeBias, Windows
from halvit_jax.models import swin, vit
from halvit_jax.models.validation import check_divides

LOCAL = 7  # side of Mini-Swin's depthwise convolution, whatever the window

MEAN = {"pool": "mean"}  # Mini-DeiT has no class token
DEIT_SIZES: dict[str, dict[str, Any]] = {
    "mini_deit_tiny": vit.TINY | MEAN,
    "mini_deit_small": vit.SMALL | MEAN,
    "mini_deit_base": vit.BASE | MEAN,
    "mini_halvit_tiny": vit.SMALL | vit.TIED | MEAN,  # tied matrices, shared by two layers: nobody has published this
    "mini_halvit_small": vit.BASE | vit.TIED | MEAN,
}
SWIN_SIZES: dict[str, dict[str, Any]] = {
    "mini_swin_tiny": {"shares": (2, 2, 6, 2)},
    "mini_swin_small": swin.SMALL,
    "mini_swin_base": swin.SMALL | {"width": 128},
}

# The matrices as in the parents; what a repeat has of its own is too small to be split, but for its convolution.
PARTITION_RULES = (
    (r"mix_\w+/kernel$", ()),
    (r"local_conv/kernel$", (None, None, None, "fsdp")),
    (r"table$", ()),
    *vit.PARTITION_RULES,
)


class MiniDeit(vit.VisionTransformer):
    """A VisionTransformer each of whose blocks runs `share` times in a row; `depth` counts the runs.

    Every run has iRPE's relative positions and mixes the heads. Of the degrees of the paper, 2 is what was released.
    """

    share: int = 2

    def __post_init__(self) -> None:
        check_divides("share", self.share, "depth", self.depth)
        if self.ffn_rank != 1.0:  # whose norms would need statistics of each run
            raise ValueError(f"model.ffn_rank={self.ffn_rank} must be 1 where layers share matrices (model.share)")
        super().__post_init__()

    def _make_blocks(self) -> list[nn.Module]:
        rates = linear_rates(self.drop_path, self.depth)
        return [
            SharedBlock(
                width=self.width,
                num_heads=self.num_heads,
                hidden=round(self.width * self.ffn_ratio),
                attention=self.attention,
                ffn=self.ffn,
                attention_bias=self.attention_bias,
                real_heads=self.real_heads,
                hallucinate=self.hallucinate,
                attention_impl=self.attention_impl,
                dtype=self.dtype,
                grid=self._grid,
                rates=tuple(rates[i * self.share : (i + 1) * self.share]),
                remat=self.remat,
                name=f"block{i}",
            )
            for i in range(self.depth // self.share)
        ]


class SharedBlock(nn.Module):
    """Consecutive layers of Mini-DeiT with the same attention and feed-forward matrices: [b, n, d] -> [b, n, d]."""

    width: int
    num_heads: int
    hidden: int
    attention: str  # a key of ATTENTION
    ffn: str  # a key of FFN
    attention_bias: bool
    real_heads: float
    hallucinate: str  # one of HALLUCINATE
    attention_impl: str  # one of CHOICES
    dtype: Dtype
    grid: tuple[int, int]
    rates: tuple[float, ...]  # stochastic depth of each run
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        attention = ATTENTION[self.attention](
            self.width,
            self.num_heads,
            bias=self.attention_bias,
            real_heads=self.real_heads,
            hallucinate=self.hallucinate,
            attention_impl=self.attention_impl,
            dtype=self.dtype,
            name="attention",
        )
        ffn = FFN[self.ffn](self.width, self.hidden, dtype=self.dtype, name="ffn")
        for i, rate in enumerate(self.rates):
            x = _run(Repeat(attention, ffn, self.grid, rate, self.dtype, name=f"repeat{i}"), x, train, self.remat)
        return x


class Repeat(nn.Module):
    """One run of a SharedBlock's layers, with what is its own: [b, n, d] -> [b, n, d]."""

    attention: nn.Module  # the block's
    ffn: nn.Module  # the block's
    grid: tuple[int, int]
    drop_path: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        position = ContextualPosition(self.grid, name="position")
        mix_logits, mix_weights = HeadMix(False, name="mix_logits"), HeadMix(False, name="mix_weights")
        drop = DropPath(self.drop_path, name="drop_path")

        def before(logits: jax.Array, query: jax.Array) -> jax.Array:
            return mix_logits(logits + position(query))

        y = nn.LayerNorm(vit.EPSILON, dtype=self.dtype, name="attention_norm")(x)
        x = x + drop(self.attention(y, before=before, after=mix_weights), train=train)
        x = x + drop(
            self.ffn(nn.LayerNorm(vit.EPSILON, dtype=self.dtype, name="ffn_norm")(x), train=train), train=train
        )
        keep(self, "hidden", x)
        return x


class MiniSwin(swin.SwinTransformer):
    """A SwinTransformer whose blocks run several times in a row, `shares` in each stage; `depths` counts the runs.

    Shifted and unshifted runs take turns through a stage. Every run mixes the heads, and between attention and
    feed-forward layer replaces the tokens by their norm and adds a depthwise convolution of them.

    Args:
        shares: the runs of a block in each stage; divides the stage's depth.
        mask_unshifted: mask the unshifted runs like the shifted ones, wherever a map has more than one window. So the
            released networks were trained, and their weights need it; it is no part of the paper.
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

    def _blocks(self, stage: int, rates: tuple[float, ...]) -> list[Callable[..., nn.Module]]:
        share = self.shares[stage]
        fields = {**self._shape(stage), "mask_unshifted": self.mask_unshifted, "remat": self.remat}
        return [
            functools.partial(SharedSwinBlock, **fields, first=first, rates=rates[first : first + share])
            for first in range(0, len(rates), share)
        ]


class SharedSwinBlock(nn.Module):
    """Consecutive layers of Mini-Swin with the same matrices and biases of position: [b, u, v, d] -> [b, u, v, d]."""

    width: int
    num_heads: int
    hidden: int
    window: int
    attention: str  # a key of ATTENTION
    ffn: str  # a key of FFN
    attention_bias: bool
    dtype: Dtype
    first: int  # number in its stage of the first run; the odd ones are shifted
    rates: tuple[float, ...]  # stochastic depth of each run
    mask_unshifted: bool
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        attention = ATTENTION[self.attention](
            self.width, self.num_heads, bias=self.attention_bias, dtype=self.dtype, name="attention"
        )
        position_bias = RelativeBias(self.window, self.num_heads, name="position_bias")
        ffn = FFN[self.ffn](self.width, self.hidden, dtype=self.dtype, name="ffn")
        grid = x.shape[1:3]
        shifted = Windows(grid, self.window, swin.half_window(grid, self.window))
        for i, rate in enumerate(self.rates):
            windows = shifted if (self.first + i) % 2 else Windows(grid, self.window)
            masking = shifted if self.mask_unshifted else windows
            repeat = SwinRepeat(attention, position_bias, ffn, windows, masking, rate, self.dtype, name=f"repeat{i}")
            x = _run(repeat, x, train, self.remat)
        return x


class SwinRepeat(nn.Module):
    """One run of a SharedSwinBlock's layers, with what is its own: [b, u, v, d] -> [b, u, v, d]."""

    attention: nn.Module  # the block's
    position_bias: RelativeBias  # the block's
    ffn: nn.Module  # the block's
    windows: Windows
    masking: Windows  # whose mask is applied
    drop_path: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        mix_logits, mix_weights = HeadMix(True, name="mix_logits"), HeadMix(True, name="mix_weights")
        drop = DropPath(self.drop_path, name="drop_path")
        norm = functools.partial(nn.LayerNorm, swin.EPSILON, dtype=self.dtype)

        def before(logits: jax.Array, query: jax.Array) -> jax.Array:
            del query
            return self.masking.mask(mix_logits(logits + self.position_bias().astype(logits.dtype)))

        y = self.windows.split(norm(name="attention_norm")(x))
        x = x + drop(self.windows.join(self.attention(y, before=before, after=mix_weights)), train=train)
        x = norm(name="local_norm")(x)
        local_conv = Conv(x.shape[-1], LOCAL, groups=x.shape[-1], use_bias=True, dtype=self.dtype, name="local_conv")
        x = x + local_conv(x)
        x = x + drop(self.ffn(norm(name="ffn_norm")(x), train=train), train=train)
        keep(self, "hidden", x)
        return x


def _run(repeat: nn.Module, x: jax.Array, train: bool, remat: bool) -> jax.Array:
    def run(repeat: nn.Module, x: jax.Array) -> jax.Array:
        return repeat(x, train)

    return (nn.remat(run) if remat else run)(repeat, x)
