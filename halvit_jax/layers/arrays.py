"""Ranks and types made explicit. The tests run with JAX's implicit promotion of both switched off."""

import jax
import jax.numpy as jnp


def align_last(value: jax.Array, x: jax.Array) -> jax.Array:
    """`value` with axes of length 1 in front, up to the rank of x, so that the last axes of both correspond."""
    return jnp.expand_dims(value, tuple(range(x.ndim - value.ndim)))


def widen(x: jax.Array) -> jax.Array:
    """x in float32 at least, the type of sums."""
    return x.astype(wide_type(x))


def wide_type(x: jax.Array) -> jnp.dtype:
    """The type of sums: at least float32."""
    return x.dtype if x.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
