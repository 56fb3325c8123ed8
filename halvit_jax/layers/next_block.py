"""The blocks of Next-ViT: convolution block (NCB) and transformer block (NTB), section 3 of the paper.

Li et al., "Next-ViT", 2022, https://arxiv.org/abs/2207.05501.

Shapes: `b` batch, `u v` height and width of a map, `c` its channels before a block, `d` width, `n` = u v tokens.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.batch_norm import BatchNorm
from halvit_jax.layers.conv import ConvNorm
from halvit_jax.layers.drop import DropPath
from halvit_jax.layers.efficient_attention import LocalAttention, PooledAttention, halve_map
from halvit_jax.layers.ffn import Compact, Mlp
from halvit_jax.layers.initializers import Dtype, normal_02

ATTENDING = 3  # of the 4 quarters of a transformer block's output; the last quarter is a convolution
CONV_RATIO, TRANSFORMER_RATIO = 3, 2  # hidden width / width of the feed-forward layers


class ConvBlock(nn.Module):
    """Next Convolution Block: [b, u, v, c] -> [b, u, v, d], or a map of half the size."""

    width: int  # d
    head_width: int
    compact: Compact
    dtype: Dtype
    halve: bool
    drop_path: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        common = {"dtype": self.dtype, "folded": self.compact.folded}
        x = patch_embed(x, self.width, halve=self.halve, train=train, **common)
        local = LocalAttention(self.head_width, **common, name="local")
        drop = DropPath(self.drop_path, name="drop_path")
        x = x + drop(local(x, train=train), train=train)
        return x + drop(mlp(x, CONV_RATIO, self.compact, train=train, dtype=self.dtype), train=train)


class TransformerBlock(nn.Module):
    """Next Transformer Block: [b, u, v, c] -> [b, u, v, 4/3 d], or a map of half the size.

    Three quarters of the channels are attention's (low frequencies), the last a convolution of them (high ones). The
    rate of stochastic depth is split between the two in proportion to the channels.
    """

    width: int  # d
    head_width: int
    reduction: int
    real_heads: float
    hallucinate: str
    attention_impl: str
    compact: Compact
    dtype: Dtype
    halve: bool
    drop_path: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        common = {"dtype": self.dtype, "folded": self.compact.folded}
        x = patch_embed(x, self.width, halve=self.halve, train=train, **common)
        heads = self.width // self.head_width
        attention = PooledAttention(
            heads,
            self.reduction,
            self.real_heads,
            self.hallucinate,
            **common,
            attention_impl=self.attention_impl,
            name="attention",
        )
        fraction = ATTENDING / (ATTENDING + 1)
        y = unfused_norm(**common, name="attention_norm")(x, train=train)
        y = attention(y.reshape(y.shape[0], -1, self.width), train=train).reshape(x.shape)  # [b, n, d], [b, u, v, d]
        x = x + DropPath(self.drop_path * fraction, name="attention_drop")(y, train=train)

        narrow = ConvNorm(self.width // ATTENDING, kernel_init=normal_02, **common, name="narrow")
        y = narrow(x, train=train)
        local = LocalAttention(self.head_width, **common, name="local")(y, train=train)
        y = y + DropPath(self.drop_path * (1 - fraction), name="local_drop")(local, train=train)

        x = jnp.concatenate([x, y], axis=-1)
        y = mlp(x, TRANSFORMER_RATIO, self.compact, train=train, dtype=self.dtype)
        return x + DropPath(self.drop_path, name="ffn_drop")(y, train=train)


def unfused_norm(dtype: Dtype, folded: bool, name: str | None = None) -> BatchNorm:
    """A batch normalisation without a convolution before it: folded, a scale and a bias remain."""
    return BatchNorm(dtype=dtype, folded="affine" if folded else "", name=name)


def mlp(x: jax.Array, ratio: int, compact: Compact, *, train: bool, dtype: Dtype) -> jax.Array:
    """The end of a block, W2 relu(W1 norm(x) + b1) + b2 with `ratio` times the channels inside."""
    width = x.shape[-1]
    ffn = Mlp(width, ratio * width, compact=compact, activation=nn.relu, dtype=dtype, name="ffn")
    return ffn(unfused_norm(dtype, compact.folded, name="ffn_norm")(x, train=train), train=train)


def patch_embed(x: jax.Array, width: int, *, halve: bool, train: bool, dtype: Dtype, folded: bool) -> jax.Array:
    """The start of a block: [b, u, v, c] -> [b, u, v, d] or [b, u/2, v/2, d]; the identity if neither changes."""
    if not halve and x.shape[-1] == width:
        return x
    norm = ConvNorm(width, kernel_init=normal_02, dtype=dtype, folded=folded, name="embed")
    return norm(halve_map(x) if halve else x, train=train)
