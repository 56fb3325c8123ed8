"""Self-attention: full and tied, of a transformer block, and with a single head, of a convolutional one.

Shapes: `b` batch, `n` tokens, `d` width, `h` heads, `k` width of a head (d = h k). Every class of ATTENTION maps
[b, n, d] -> [b, n, d] and takes the same fields, so that a block chooses one by name. Of single-head attention, `h w`
is space, `c` channels and `p` those it attends with.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.conv import ConvNorm
from halvit_jax.layers.init import Dtype, normal_02
from halvit_jax.layers.tied import TiedDense

GROUP_EPSILON = 1e-5  # of single-head attention's group normalisation


class SelfAttention(nn.Module):
    """Multi-head attention with its own matrices for queries, keys, values (one product) and for the output."""

    width: int  # d
    num_heads: int  # h
    bias: bool = True
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = {"use_bias": self.bias, "kernel_init": normal_02, "dtype": self.dtype}
        query, key, value = jnp.split(nn.Dense(3 * self.width, **dense, name="qkv")(x), 3, axis=-1)
        weights = attention_weights(query, key, num_heads=self.num_heads)
        _keep(self, weights)
        out = average(weights, value)
        return nn.Dense(self.width, **dense, name="output")(out)


class TiedAttention(nn.Module):
    """Q = x Wq, K = x Wkv, V = x Wkv^T, output = o Wq^T: two square matrices instead of four (HaLViT)."""

    width: int  # d
    num_heads: int  # h
    bias: bool = False
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        query_output = TiedDense(self.width, self.width, dtype=self.dtype, name="query_output")
        key_value = TiedDense(self.width, self.width, dtype=self.dtype, name="key_value")
        query, key, value = query_output.project(x), key_value.project(x), key_value.project_back(x)
        if self.bias:
            query, key, value = self._shift("query", query), self._shift("key", key), self._shift("value", value)
        weights = attention_weights(query, key, num_heads=self.num_heads)
        _keep(self, weights)
        out = query_output.project_back(average(weights, value))
        return self._shift("output", out) if self.bias else out

    def _shift(self, name: str, x: jax.Array) -> jax.Array:
        return x + self.param(f"{name}_bias", nn.initializers.zeros, (self.width,)).astype(x.dtype)


class SingleHeadAttention(nn.Module):
    """Attention of one head over a part of the channels, SHSA of SHViT (Yun and Ro, 2024, arXiv 2401.16456).

        x1, x2 = the first p channels of x, the others
        q, k, v = norm(group_norm(x1) W), of widths k, k and p
        y = norm(relu([softmax(q k^T / sqrt(k)) v, x2]) W_o)

    [b, h, w, c] -> [b, h, w, c], the tokens being the places of the map. Both norms follow their product, a 1x1
    convolution, and are batch normalisations; the group is x1 as a whole, normalised over space and channels together.
    The last norm's scale begins at 0, so that a residual block begins as its shortcut.
    """

    partial: int  # p
    query_width: int = 16  # k
    dtype: Dtype = None
    folded: bool = False  # see `layers.conv.fold`

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        common = {"dtype": self.dtype, "folded": self.folded}
        mixed, rest = x[..., : self.partial], x[..., self.partial :]
        # Flax's quicker variance is the mean of squares less the squared mean, which loses digits.
        norm = nn.GroupNorm(1, epsilon=GROUP_EPSILON, use_fast_variance=False, dtype=self.dtype, name="norm")
        widths = self.query_width, self.query_width, self.partial
        qkv = ConvNorm(sum(widths), **common, name="qkv")(norm(mixed), train=train)
        qkv = qkv.reshape(qkv.shape[0], -1, qkv.shape[-1])  # [b, n, 2 k + p]
        query, key, value = jnp.split(qkv, [widths[0], widths[0] + widths[1]], axis=-1)
        weights = attention_weights(query, key, num_heads=1)
        _keep(self, weights)
        mixed = average(weights, value).reshape(mixed.shape)  # [b, n, p] -> [b, h, w, p]
        out = nn.relu(jnp.concatenate([mixed, rest], axis=-1))
        return ConvNorm(x.shape[-1], scale_init=nn.initializers.zeros, **common, name="output")(out, train=train)


ATTENTION: dict[str, type[nn.Module]] = {"full": SelfAttention, "tied": TiedAttention}


def attention_weights(query: jax.Array, key: jax.Array, *, num_heads: int) -> jax.Array:
    """softmax(Q K^T / sqrt(k)), head by head: [b, n, d] twice -> [b, h, n, n], whose rows sum to 1.

    The softmax is computed in float32 whatever the type of the input, in which the result is. Heads come before tokens
    so that every product is one of plain matrices: on a CPU twice as fast as with the heads in between. The queries are
    scaled because they are fewer numbers than the logits.
    """
    query, key = _split_heads(query, num_heads), _split_heads(key, num_heads)
    logits = jnp.einsum("bhqk,bhnk->bhqn", query * query.shape[-1] ** -0.5, key)
    return jax.nn.softmax(logits.astype(jnp.float32)).astype(query.dtype)


def average(weights: jax.Array, value: jax.Array) -> jax.Array:
    """The values [b, n, d] averaged with the weights [b, h, n, n] of their head: [b, n, d]."""
    out = jnp.einsum("bhqn,bhnk->bhqk", weights, _split_heads(value, weights.shape[1])).transpose(0, 2, 1, 3)
    return out.reshape(*out.shape[:2], -1)  # [b, n, h, k] -> [b, n, d]


def _keep(module: nn.Module, weights: jax.Array) -> None:
    """Hand the weights to a caller who asks for intermediates; nobody else pays for it."""
    if not module.is_initializing():
        module.sow("intermediates", "weights", weights)


def _split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)  # [b, h, n, k]
