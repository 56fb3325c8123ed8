"""Fused attention: the map is never materialised in device memory.

Shapes: `b` batch, `n` tokens, `m` keys, `h` heads, `k` width of a head.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp


class Implementation(Protocol):
    """softmax(Q K^T / sqrt(k)) V, head by head: [b, n, h k], [b, m, h k] and [b, m, h k] -> [b, n, h k]."""

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, *, num_heads: int) -> jax.Array: ...


def padded_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    num_heads: int,
    multiple: int = 8,
    implementation: str = "cudnn",
) -> jax.Array:
    """`jax.nn.dot_product_attention` on tokens padded to a multiple, padded keys being masked by their number.

    The padding is for cuDNN's flash attention, which JAX refuses to differentiate for odd numbers of tokens.
    """
    n, m = query.shape[1], key.shape[1]
    padded = [jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0))) for x in (query, key, value)]
    heads = [x.reshape(*x.shape[:2], num_heads, -1) for x in padded]  # [b, n, h, k]
    lengths = jnp.full(key.shape[:1], m, jnp.int32) if m % multiple else None
    out = jax.nn.dot_product_attention(*heads, key_value_seq_lengths=lengths, implementation=implementation)
    return out.reshape(padded[0].shape)[:, :n]


ATTENTION_IMPLS: dict[str, Implementation] = {"cudnn": padded_attention}
FUSED_ON = {"gpu": "cudnn"}  # platform -> its fused implementation
CHOICES = ("auto", "xla", "fused")
HALF_TYPES = (jnp.bfloat16, jnp.float16)
WIDEST_HEAD = 128


def choose(wanted: str, *, platform: str, dtype: Any, head_width: int, needs_map: str = "") -> str:
    """A key of ATTENTION_IMPLS, or "xla": plain products and softmax, with the map in memory.

    `wanted` is one of CHOICES; `needs_map` is the reason why the map must exist, or "".

    Raises:
        ValueError: "fused" is required and not possible.
    """
    if wanted == "xla":
        return "xla"
    obstacle = needs_map or _obstacle(platform, dtype, head_width)
    if not obstacle:
        return FUSED_ON[platform]
    if wanted == "fused":
        raise ValueError(f"model.attention_impl='fused' is not possible: {obstacle}; set it to 'auto' or 'xla'")
    return "xla"


def _obstacle(platform: str, dtype: Any, head_width: int) -> str:
    """The reason why attention cannot be fused, or ""."""
    if platform not in FUSED_ON:
        return f"it needs one of the platforms {', '.join(FUSED_ON)}, not {platform}"
    if dtype not in HALF_TYPES:
        return f"it needs bfloat16 or float16, not {jnp.dtype(dtype).name} (compute_dtype)"
    if head_width % 8 or head_width > WIDEST_HEAD:
        return f"it needs heads whose width is a multiple of 8 up to {WIDEST_HEAD}, not {head_width}"
    return ""
