"""What a traced program consists of."""

from collections.abc import Callable
from typing import Any

import jax


def count_remats(function: Callable[..., Any], *arguments: Any) -> int:
    """How many pieces of a function are recomputed in its backward pass."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith(("remat", "checkpoint")):
            found += 1
        else:
            inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns"))
            found += sum(_count(getattr(value, "jaxpr", value)) for value in inner if hasattr(value, "eqns"))
    return found
