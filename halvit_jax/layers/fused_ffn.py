"""Fused feed-forward layers: the hidden activations are never materialised in device memory.

Shapes: `b` batch, `n` tokens, `d` width, `f` hidden.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from halvit_jax.layers import placement
from halvit_jax.layers.placement import Place, over_rows
from halvit_jax.layers.tpu_ffn import LONGEST_BLOCK, Biases, Weights, block_of_tokens, ffn_in_vmem, needed_bytes
from halvit_jax.layers.tpu_kernel import memory_obstacle


class Implementation(Protocol):
    """gelu(x W1 + b1) W2 + b2, [b, n, d] -> the same, with W2 = W1^T if there is no W2."""

    def __call__(self, x: jax.Array, weights: Weights, biases: Biases) -> jax.Array: ...


def ffn_over_rows(x: jax.Array, weights: Weights, biases: Biases) -> jax.Array:
    """`ffn_in_vmem`, a kernel for TPUs, on the rows of each device."""

    def layer(x: jax.Array, *given: jax.Array) -> jax.Array:
        return ffn_in_vmem(x, given[:-2], given[-2:])

    return over_rows(layer, (x,), (*weights, *biases))


FFN_IMPLS: dict[str, Implementation] = {"pallas": ffn_over_rows}
FFN_FUSED_ON = {"tpu": "pallas"}  # platform -> its fused implementation


def choose_ffn(
    wanted: str, *, place: Place, dtype: Any, shape: tuple[int, ...], hidden: int, tied: bool, needs_hidden: str = ""
) -> str:
    """A key of FFN_IMPLS, or "xla": plain products, with the hidden activations in memory.

    `wanted` is one of CHOICES of `fused_attention`; `shape` is that of the input, [b, n, d]; `needs_hidden` is the
    reason why the hidden activations must exist, or "".

    Raises:
        ValueError: "fused" is required and not possible.
    """
    if wanted == "xla":
        return "xla"
    obstacle = needs_hidden or _obstacle(place, dtype, shape, hidden, tied)
    if not obstacle:
        return FFN_FUSED_ON[place.platform]
    if wanted == "fused":
        raise ValueError(f"model.ffn_impl='fused' is not possible: {obstacle}; set it to 'auto' or 'xla'")
    return "xla"


def _obstacle(place: Place, dtype: Any, shape: tuple[int, ...], hidden: int, tied: bool) -> str:
    """The reason why the layer cannot be fused, or ""."""
    if place.platform not in FFN_FUSED_ON:
        return f"it needs one of the platforms {', '.join(FFN_FUSED_ON)}, not {place.platform}"
    if dtype != jnp.bfloat16:
        return f"it needs bfloat16, not {jnp.dtype(dtype).name} (compute_dtype)"
    if not block_of_tokens(shape[1]):
        return f"{shape[1]} tokens do not divide into blocks of a multiple of 16 up to {LONGEST_BLOCK}"
    if found := placement.obstacle(place, shape[0]):
        return found
    rows = shape[0] // place.rows, *shape[1:]
    return memory_obstacle(place.kind, needed_bytes(rows, hidden, dtype, tied=tied))
