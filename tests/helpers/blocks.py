"""A small transformer block and its input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from halvit_jax.layers.attention import SelfAttention
from halvit_jax.layers.block import PreNormBlock
from halvit_jax.layers.ffn import Mlp

WIDTH = 8


def small_block(*, drop_path: float = 0.0) -> PreNormBlock:
    """A block of two heads."""
    attention, ffn = functools.partial(SelfAttention, WIDTH, 2), functools.partial(Mlp, WIDTH, 2 * WIDTH)
    return PreNormBlock(attention, ffn, 1e-6, drop_path, None)


def block_input() -> jax.Array:
    """Three examples of five tokens."""
    return jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, WIDTH)), jnp.float32)
