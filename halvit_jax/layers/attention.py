"""Self-attention: full, tied, and single-head.

Shapes: `b` batch, `n` tokens, `m` keys, `d` width, `h` heads, `k` width of a head (d = h k), `r` real heads, which have
queries and keys of their own (r = h without hallucinated maps). In single-head attention, `h w` is space, `c` channels
and `p` attention channels. Every class of ATTENTION maps [b, n, d] -> [b, n, d] and takes the same fields, so a block
chooses one by name. Relative positions, masks and the mixing of heads are functions that the block passes:

    logits_fn(logits [b, r, n, n], scaled queries [b, r, n, k]) -> logits
    weights_fn(weights [b, h, n, n]) -> weights

`logits_fn` sees the real heads alone, before any hallucination, and `weights_fn` sees all heads.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.arrays import align_last
from halvit_jax.layers.conv import ConvNorm, depthwise_maps
from halvit_jax.layers.fused_attention import ATTENTION_IMPLS, Shapes, choose
from halvit_jax.layers.initializers import Dtype, normal_02
from halvit_jax.layers.placement import current
from halvit_jax.layers.sow import sow
from halvit_jax.layers.tied import TiedDense

LogitsFn = Callable[[jax.Array, jax.Array], jax.Array] | None
WeightsFn = Callable[[jax.Array], jax.Array] | None
GROUP_EPSILON = 1e-5  # of single-head attention's group normalisation


class SelfAttention(nn.Module):
    """Multi-head attention with its own matrices for queries, keys, values (one product) and for the output."""

    width: int  # d
    num_heads: int  # h
    bias: bool = True
    real_heads: float = 1.0  # fraction of the heads; the maps of the others are hallucinated, see `AttentionMaps`
    hallucinate: str = "logits"  # one of HALLUCINATE
    attention_impl: str = "auto"  # one of CHOICES, see `attend`
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, *, logits_fn: LogitsFn = None, weights_fn: WeightsFn = None) -> jax.Array:
        dense = {"use_bias": self.bias, "kernel_init": normal_02, "dtype": self.dtype}
        maps = AttentionMaps(self.num_heads, self.real_heads, self.hallucinate, name="maps")
        part = maps.real_width(self.width)
        qkv = nn.Dense(2 * part + self.width, **dense, name="qkv")(x)
        query, key, value = jnp.split(qkv, (part, 2 * part), axis=-1)
        sow(self, "query_key_value", query, key, value)
        out = attend(self, maps, query, key, value, logits_fn=logits_fn, weights_fn=weights_fn)
        return nn.Dense(self.width, **dense, name="output")(out)


class TiedAttention(nn.Module):
    """Q = x Wq, K = x Wkv, V = x Wkv^T, output = o Wq^T: two square matrices instead of four (HaLViT)."""

    width: int  # d
    num_heads: int  # h
    bias: bool = False
    real_heads: float = 1.0  # as in SelfAttention; saves products but no matrix, because the other use needs all of it
    hallucinate: str = "logits"
    attention_impl: str = "auto"
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, *, logits_fn: LogitsFn = None, weights_fn: WeightsFn = None) -> jax.Array:
        query_output = TiedDense(self.width, self.width, dtype=self.dtype, name="query_output")
        key_value = TiedDense(self.width, self.width, dtype=self.dtype, name="key_value")
        maps = AttentionMaps(self.num_heads, self.real_heads, self.hallucinate, name="maps")
        part = maps.real_width(self.width)
        query, key = query_output.project(x, first=part), key_value.project(x, first=part)
        value = key_value.project_back(x)
        if self.bias:
            query, key, value = self._shift("query", query), self._shift("key", key), self._shift("value", value)
        sow(self, "query_key_value", query, key, value)
        out = attend(self, maps, query, key, value, logits_fn=logits_fn, weights_fn=weights_fn)
        out = query_output.project_back(out)
        return self._shift("output", out) if self.bias else out

    def _shift(self, name: str, x: jax.Array) -> jax.Array:
        bias = self.param(f"{name}_bias", nn.initializers.zeros, x.shape[-1:])
        return x + align_last(bias.astype(x.dtype), x)


class SingleHeadAttention(nn.Module):
    """Attention of one head over a part of the channels, SHSA of SHViT (Yun and Ro, 2024, arXiv 2401.16456).

        x1, x2 = the first p channels of x, the others
        q, k, v = norm(group_norm(x1) W), of widths k, k and p
        y = norm(relu([softmax(q k^T / sqrt(k)) v, x2]) W_o)

    [b, h, w, c] -> [b, h, w, c]; the tokens are the places of the map. Both norms are batch normalisations after a 1x1
    convolution. The group is all of x1, normalised over space and channels together. The last norm's scale is
    initialised to 0, so a residual block starts as its shortcut.
    """

    partial: int  # p
    query_width: int = 16  # k
    dtype: Dtype = None
    folded: bool = False  # see `layers.batch_norm.fold`

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
        sow(self, "weights", weights)
        mixed = weighted_values(weights, value).reshape(mixed.shape)  # [b, n, p] -> [b, h, w, p]
        out = nn.relu(jnp.concatenate([mixed, rest], axis=-1))
        return ConvNorm(x.shape[-1], scale_init=nn.initializers.zeros, **common, name="output")(out, train=train)


ATTENTION: dict[str, type[nn.Module]] = {"full": SelfAttention, "tied": TiedAttention}


class AttentionMaps(nn.Module):
    """Attention weights of all heads: real ones from queries and keys, the others hallucinated from the real ones.

    queries [b, n, r k], keys [b, m, r k] -> weights [b, h, n, m], the real heads' first. With L = Q K^T / sqrt(k) of
    the real heads [b, r, n, m] and H of `Hallucination`, either of

        "logits"    softmax([L, H(L)])
        "maps"      [A, relu(H(A)) / row sums],  A = softmax(L)

    Rows sum to 1. The exception is a row of "maps" with a sum of H below FLOOR, which fades to 0. With all heads real
    there is no H.

    The paper (Xu et al., 2023, arXiv 2306.10875) states that half of the maps are hallucinated from the other half by
    much cheaper operations. Its code is not released. The operations, "logits" as the place, r = h / 2 rounded up for
    an odd h, and the order of the heads are our reading.
    """

    num_heads: int  # h
    real_heads: float = 1.0  # r / h, rounded up to whole heads
    hallucinate: str = "logits"  # one of HALLUCINATE

    @property
    def real(self) -> int:
        """r."""
        return math.ceil(round(self.num_heads * self.real_heads, 6))  # 20 x 0.55 is a little more than 11

    def real_width(self, width: int) -> int:
        """The width r k of the real heads, from the width h k of all heads."""
        return width * self.real // self.num_heads

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, *, logits_fn: LogitsFn = None) -> jax.Array:
        if self.real == self.num_heads:
            return attention_weights(query, key, num_heads=self.num_heads, logits_fn=logits_fn)
        more = Hallucination(self.num_heads - self.real, name="hallucination")
        if self.hallucinate == "maps":
            weights = attention_weights(query, key, num_heads=self.real, logits_fn=logits_fn)
            made = nn.relu(more(weights)).astype(jnp.float32)  # as the softmax
            made /= jnp.maximum(made.sum(-1, keepdims=True), FLOOR)
            return jnp.concatenate([weights, made.astype(weights.dtype)], axis=1)

        def all_logits(logits: jax.Array, query: jax.Array) -> jax.Array:
            logits = logits_fn(logits, query) if logits_fn else logits
            return jnp.concatenate([logits, more(logits)], axis=1)

        return attention_weights(query, key, num_heads=self.real, logits_fn=all_logits)


HALLUCINATE = ("logits", "maps")
FLOOR = 1e-6  # a smaller divisor gives a huge gradient, and a sum of 0 gives NaN


class Hallucination(nn.Module):
    """H, maps or logits of further heads made from those of the real ones: [b, r, n, m] -> [b, heads, n, m].

        mixed_g = sum_s C_sg A_s        across the heads, s = 1 ... r: a 1x1 convolution
        made_g = D_g * mixed_g          within each map, a 3x3 convolution with zeros around it; m and n may differ

    heads (r + 9) parameters, no bias. The initial C is uniform in [0, 2 / r] and D_g the identity: every map starts as
    a sum of the real ones with its own weights, 1 / r in the mean. All of this is our reading, see `AttentionMaps`.
    """

    heads: int

    @nn.compact
    def __call__(self, maps: jax.Array) -> jax.Array:
        real = maps.shape[1]  # r
        across = self.param("across", nn.initializers.uniform(2 / real), (real, self.heads))
        within = self.param("within", _centre, (3, 3, 1, self.heads))
        mixed = jnp.einsum("brnm,rg->bgnm", maps, across.astype(maps.dtype))
        return depthwise_maps(mixed, within.astype(maps.dtype))


class TalkingHeads(nn.Module):
    """A 1x1 convolution across the heads: A'_g = sum_h W_hg A_h (+ b_g), [b, h, n, n] -> [b, h, n, n].

    From "Talking-Heads Attention" (arXiv 2003.02436). MiniViT (arXiv 2204.07154) uses it to give each use of shared
    matrices its own maps.
    """

    bias: bool

    @nn.compact
    def __call__(self, maps: jax.Array) -> jax.Array:
        h = maps.shape[1]
        kernel = self.param("kernel", normal_02, (h, h))
        mixed = jnp.einsum("bhqn,hg->bgqn", maps, kernel.astype(maps.dtype))
        if not self.bias:
            return mixed
        return mixed + self.param("bias", nn.initializers.zeros, (h,)).astype(maps.dtype)[None, :, None, None]


def attend(
    module: nn.Module,
    maps: AttentionMaps,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    logits_fn: LogitsFn = None,
    weights_fn: WeightsFn = None,
) -> jax.Array:
    """The values averaged with the weights of `maps`: queries [b, n, d], keys and values [b, m, d] -> [b, n, d].

    Weights that nothing reads need not exist: `module.attention_impl`, one of CHOICES, selects the implementation
    ("auto": fused where the platform, the type and the shapes allow it).

    Raises:
        ValueError: "fused" is required and not possible.
    """
    needs_map = ""
    if maps.real < maps.num_heads:
        needs_map = "maps are hallucinated (model.real_heads)"
    elif logits_fn or weights_fn:
        needs_map = "positions, a mask or the mixing of heads change it"
    chosen = "xla"
    if not (module.is_initializing() or module.is_mutable_collection("intermediates")):
        (b, n, _), (_, m, width) = query.shape, value.shape
        chosen = choose(
            module.attention_impl,
            place=current(),
            dtype=query.dtype,
            shapes=Shapes(b, n, m, maps.num_heads, width // maps.num_heads),
            needs_map=needs_map,
        )
    if chosen != "xla":
        return ATTENTION_IMPLS[chosen](query, key, value, num_heads=maps.num_heads)
    weights = maps(query, key, logits_fn=logits_fn)
    sow(module, "weights", weights)
    return weighted_values(weights_fn(weights) if weights_fn else weights, value)


def attention_weights(query: jax.Array, key: jax.Array, *, num_heads: int, logits_fn: LogitsFn = None) -> jax.Array:
    """softmax(Q K^T / sqrt(k)), head by head: [b, n, d] and [b, m, d] -> [b, h, n, m]; rows sum to 1.

    The softmax is computed in float32 and returned in the input's type. Heads come before tokens, so every product is
    one of plain matrices: twice as fast on a CPU as with the heads in between. The queries are scaled because they are
    fewer numbers than the logits.
    """
    query, key = _split_heads(query, num_heads), _split_heads(key, num_heads)
    query *= query.shape[-1] ** -0.5
    logits = jnp.einsum("bhqk,bhnk->bhqn", query, key)
    logits = logits_fn(logits, query) if logits_fn else logits
    return jax.nn.softmax(logits.astype(jnp.float32)).astype(query.dtype)


def weighted_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """The values [b, m, d] averaged with the weights [b, h, n, m] of their head: [b, n, d]."""
    out = jnp.einsum("bhqn,bhnk->bhqk", weights, _split_heads(value, weights.shape[1])).transpose(0, 2, 1, 3)
    return out.reshape(*out.shape[:2], -1)  # [b, n, h, k] -> [b, n, d]


def _centre(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """The kernel of a depthwise convolution that is the identity."""
    del key
    return jnp.zeros(shape, dtype).at[shape[0] // 2, shape[1] // 2].set(1)


def _split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)  # [b, h, n, k]
