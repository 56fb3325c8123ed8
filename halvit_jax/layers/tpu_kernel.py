"""What the Pallas kernels for TPUs share: products, blocks of a grid, limits of the memory next to the cores (VMEM).

Shapes: `b` batch, `n` tokens, `c` channels.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MIB = 2**20
# VMEM of a core by the kind of device, as in `jax.experimental.pallas.tpu.get_tpu_info`. Older TPUs have 16 MiB.
VMEM = {
    "TPU v5 lite": 128 * MIB,
    "TPU v5e": 128 * MIB,
    "TPU v5": 64 * MIB,
    "TPU v5p": 64 * MIB,
    "TPU v6 lite": 128 * MIB,
    "TPU v6e": 128 * MIB,
    "TPU7x": 64 * MIB,
}
SHARE = 0.9  # of VMEM for one kernel
SPARE = 1.5  # a kernel may use this times its estimate, because the compiler keeps values that the estimate leaves out
LANES, SUBLANES = 128, 8  # of a vector register

NN = (((1,), (0,)), ((), ()))  # a @ b
NT = (((1,), (1,)), ((), ()))  # a @ b.T
TN = (((0,), (0,)), ((), ()))  # a.T @ b


def dot(a: jax.Array, b: jax.Array, dimensions: Any = NN) -> jax.Array:
    """A product of two matrices, accumulated in float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)


def rows(images: int, tokens: int, channels: int) -> pl.BlockSpec:
    """A block of [b, n, c] for a grid over images and parts of their tokens."""
    return pl.BlockSpec((images, tokens, channels), lambda i, j: (i, j, 0))


def entire(shape: tuple[int, ...]) -> pl.BlockSpec:
    """An array that stays in VMEM over the grid of `rows`."""
    return pl.BlockSpec(shape, lambda i, j: (0,) * len(shape))


def compiler_params(needed: int) -> pltpu.CompilerParams:
    """Parameters of a kernel whose estimate of VMEM is `needed` bytes; grid steps run in order, so sums may grow."""
    limit = max(16 * MIB, int(SPARE * needed))
    return pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=limit)


def padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array in VMEM, where the last two dimensions are padded to whole registers."""
    *outer, sublanes, lanes = (1, *shape)
    itemsize = jnp.dtype(dtype).itemsize
    return math.prod(outer) * _up(sublanes, SUBLANES * 4 // itemsize) * _up(lanes, LANES) * itemsize


def memory_obstacle(kind: str, needed: int) -> str:
    """The reason why a kernel whose estimate of VMEM is `needed` bytes does not run on this kind of TPU, or ""."""
    if kind not in VMEM:
        return f"it needs a TPU v5e or newer, not {kind!r}"
    if SPARE * needed > SHARE * VMEM[kind]:
        return f"it needs {SPARE * needed / MIB:.0f} MiB of the {VMEM[kind] / MIB:.0f} MiB next to the cores of {kind}"
    return ""


def images_of_step(batch: int, tokens: int) -> int:
    """Images in a step of the grid: as many as have about 400 tokens, at most 4, and divide the batch."""
    return max(size for size in (1, 2, 4) if batch % size == 0 and (size == 1 or size * tokens <= 400))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
