"""Attention whose map never lies in the device's memory, for those who do not ask for it.

Shapes: `b` batch, `n` tokens, `m` keys, `h` heads, `k` width of a head.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp


class Implementation(Protocol):
    """softmax(Q K^T / sqrt(k)) V, head by head: [b, n, h k], [b, m, h k] and [b, m, h k] -> [b, n, h k]."""

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, *, num_heads: int) -> jax.Array: ...


def of_jax(implementation: str) -> Implementation:
    """`jax.nn.dot_product_attention` by one of its implementations, "xla" or "cudnn"."""

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, num_heads: int) -> jax.Array:
        heads = [x.reshape(*x.shape[:2], num_heads, -1) for x in (query, key, value)]  # [b, n, h, k]
        return jax.nn.dot_product_attention(*heads, implementation=implementation).reshape(query.shape)

    return attend


# cuDNN's flash attention, forward and backward. It takes widths of a head up to 256 on an H100, up to 128 before it.
ATTENTION_IMPLS: dict[str, Implementation] = {"cudnn": of_jax("cudnn")}
FUSED_ON = {"gpu": "cudnn"}  # platform -> what is fused there
CHOICES = ("auto", "xla", "fused")
HALF_TYPES = (jnp.bfloat16, jnp.float16)
WIDEST_HEAD = 128


def choose(wanted: str, *, platform: str, dtype: Any, head_width: int, needs_map: str = "") -> str:
    """A key of ATTENTION_IMPLS, or "xla": products and softmax as they stand, whose map exists.

    `wanted` is one of CHOICES; `needs_map` says what looks at the map, if anything does.

    Raises:
        ValueError: "fused" is wanted and cannot be.
    """
    if wanted == "xla":
        return "xla"
    obstacle = needs_map or _obstacle(platform, dtype, head_width)
    if not obstacle:
        return FUSED_ON[platform]
    if wanted == "fused":
        raise ValueError(f"model.attention_impl='fused' cannot be: {obstacle}; set it to 'auto' or 'xla'")
    return "xla"


def _obstacle(platform: str, dtype: Any, head_width: int) -> str:
    """What keeps attention from being fused, or nothing."""
    if platform not in FUSED_ON:
        return f"it needs one of the platforms {', '.join(FUSED_ON)}, not {platform}"
    if dtype not in HALF_TYPES:
        return f"it needs bfloat16 or float16, not {jnp.dtype(dtype).name} (compute_dtype)"
    if head_width % 8 or head_width > WIDEST_HEAD:
        return f"it needs heads whose width is a multiple of 8 up to {WIDEST_HEAD}, not {head_width}"
    return ""
