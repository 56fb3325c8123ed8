"""Multiply-accumulates of all products and convolutions of a function, counted from its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax


def count_macs(function: Callable, *args: Any) -> int:
    """Multiply-accumulates of `function(*args)`; arrays may be given as shapes (jax.ShapeDtypeStruct).

    Counts dot_general and conv_general_dilated, as published figures do, without additions, norms and activations. A
    conditional counts as its most expensive branch, a loop as its length times its body, a Pallas kernel as the steps
    of its grid times its body, and a part that runs on each device as many times as there are devices.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_features
    inner = [_of_jaxpr(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * _times(name, params)


def _times(name: str, params: dict[str, Any]) -> int:
    """How often the body of an equation runs."""
    match name:
        case "scan":
            return params["length"]
        case "pallas_call":
            return math.prod(params["grid_mapping"].grid)
        case "shard_map":
            return params["mesh"].size
    return 1


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []
