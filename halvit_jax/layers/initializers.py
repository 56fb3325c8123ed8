"""Initializers of the reference implementations that differ from Flax's defaults."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

Dtype = jnp.dtype | type | str | None  # the type a layer computes in; None: the type of its input
Initializer = Callable[..., jax.Array]

# Linear layers, tokens and positions of the ViT family. The references' "truncated normal, 0.02" is cut at +-2, a
# hundred standard deviations: a plain normal distribution.
normal_02: Initializer = nn.initializers.normal(stddev=0.02)

# PyTorch's default for convolutions and linear layers: uniform with bound 1 / sqrt(fan_in).
torch_uniform: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_uniform_bias(fan_in: int) -> Initializer:
    """PyTorch's default bias: uniform with bound 1 / sqrt(fan_in) of the kernel beside it."""

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
