"""JAX's implicit promotion of ranks and types switched off for all tests of a process, but not inside libraries."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen.dtypes
import flax.linen.normalization
import jax
import optax.tree

# What promotes inside JAX, Flax and optax: activations in bfloat16 beside parameters, statistics and logits in float32;
# and a decay rate raised to an integer number of steps.
LIBRARY = (
    (jax.nn, "dot_product_attention"),
    (flax.linen.dtypes, "canonicalize_dtype"),
    (flax.linen.normalization, "_compute_stats"),
    (flax.linen.normalization, "_normalize"),
    (optax.tree, "bias_correction"),
)


def forbid_promotion() -> None:
    """Make an implicit change of rank or type an error from here on, in this process.

    Commands that a test starts as processes of their own are not reached.
    """
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    for module, name in LIBRARY:
        setattr(module, name, _promoting(getattr(module, name)))


def _promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run
