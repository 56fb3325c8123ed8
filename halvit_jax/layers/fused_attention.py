"""Fused attention: the map is never materialised in device memory.

Shapes: `b` batch, `n` tokens, `m` keys, `h` heads, `k` width of a head.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from halvit_jax.layers import placement
from halvit_jax.layers.placement import Place, over_rows
from halvit_jax.layers.tpu_attention import needed_bytes, short_attention
from halvit_jax.layers.tpu_kernel import LANES, memory_obstacle


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


def attention_in_vmem(query: jax.Array, key: jax.Array, value: jax.Array, *, num_heads: int) -> jax.Array:
    """`short_attention`, a kernel for TPUs, on the rows of each device."""
    return over_rows(lambda *arrays: short_attention(*arrays, num_heads), (query, key, value))


ATTENTION_IMPLS: dict[str, Implementation] = {"cudnn": padded_attention, "pallas": attention_in_vmem}
FUSED_ON = {"gpu": "cudnn", "tpu": "pallas"}  # platform -> its fused implementation
CHOICES = ("auto", "xla", "fused")
TYPES = {"gpu": (jnp.bfloat16, jnp.float16), "tpu": (jnp.bfloat16,)}
WIDEST_HEAD = 128


class Shapes(NamedTuple):
    """The sizes that decide whether attention can be fused."""

    batch: int  # b
    queries: int  # n
    keys: int  # m
    num_heads: int  # h
    head_width: int  # k


def choose(wanted: str, *, place: Place, dtype: Any, shapes: Shapes, needs_map: str = "") -> str:
    """A key of ATTENTION_IMPLS, or "xla": plain products and softmax, with the map in memory.

    `wanted` is one of CHOICES; `needs_map` is the reason why the map must exist, or "".

    Raises:
        ValueError: "fused" is required and not possible.
    """
    if wanted == "xla":
        return "xla"
    obstacle = needs_map or _obstacle(place, dtype, shapes)
    if not obstacle:
        return FUSED_ON[place.platform]
    if wanted == "fused":
        raise ValueError(f"model.attention_impl='fused' is not possible: {obstacle}; set it to 'auto' or 'xla'")
    return "xla"


def _obstacle(place: Place, dtype: Any, shapes: Shapes) -> str:
    """The reason why attention cannot be fused, or ""."""
    platform, head_width = place.platform, shapes.head_width
    if platform not in FUSED_ON:
        return f"it needs one of the platforms {', '.join(FUSED_ON)}, not {platform}"
    if dtype not in TYPES[platform]:
        allowed = " or ".join(jnp.dtype(one).name for one in TYPES[platform])
        return f"it needs {allowed}, not {jnp.dtype(dtype).name} (compute_dtype)"
    if head_width % 8 or head_width > WIDEST_HEAD:
        return f"it needs heads whose width is a multiple of 8 up to {WIDEST_HEAD}, not {head_width}"
    return _tpu_obstacle(place, dtype, shapes) if platform == "tpu" else ""


def _tpu_obstacle(place: Place, dtype: Any, shapes: Shapes) -> str:
    """The reason why the kernel for TPUs does not take these shapes, or ""."""
    if LANES % shapes.head_width:
        return f"it needs heads whose width divides {LANES}, not {shapes.head_width}"
    if found := placement.obstacle(place, shapes.batch):
        return found
    query = shapes.batch // place.rows, shapes.queries, shapes.num_heads * shapes.head_width
    return memory_obstacle(place.kind, needed_bytes(query, shapes.keys, dtype))
