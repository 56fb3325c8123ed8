"""The pre-norm transformer block.

Shapes: `b` batch, `n` tokens, `d` width.
"""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn

from halvit_jax.layers.drop import DropPath
from halvit_jax.layers.initializers import Dtype
from halvit_jax.layers.sow import sow


class PreNormBlock(nn.Module):
    """x += attention(norm(x));  x += ffn(norm(x)): [b, n, d] -> [b, n, d].

    Attention and FFN are factories; the block adds their names, which make the parameter paths.
    """

    attention: Callable[..., nn.Module]  # called as attention(name=...)(x)
    ffn: Callable[..., nn.Module]  # called as ffn(name=...)(x, train=train)
    epsilon: float
    drop_path: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = functools.partial(nn.LayerNorm, self.epsilon, dtype=self.dtype)
        drop = DropPath(self.drop_path, name="drop_path")
        x = x + drop(self.attention(name="attention")(norm(name="attention_norm")(x)), train=train).astype(x.dtype)
        x = x + drop(self.ffn(name="ffn")(norm(name="ffn_norm")(x), train=train), train=train).astype(x.dtype)
        sow(self, "hidden", x)
        return x
