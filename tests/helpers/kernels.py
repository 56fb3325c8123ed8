"""Comparison of a fused implementation with the plain one, and TPUs to compile kernels for."""

import importlib.util
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.analysis.tpu_topology import parse_topology, tpu_devices

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='the TPU compiler is not installed: pip install "jax[tpu]"'
)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # of the standard deviation


def normal(seed: int, *shapes: tuple[int, ...], scale: float = 1.0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for shape in shapes]


def compare(fused: Callable[..., jax.Array], plain: Callable[..., jax.Array], arrays: Sequence[jax.Array]) -> None:
    """Outputs and gradients: float32 by the largest difference, bfloat16 by its root mean square.

    The bfloat16 kernel is compared with the plain formulation in float32, on the same numbers.
    """
    with jax.default_matmul_precision("highest"):
        for dtype, tolerance in TOLERANCE.items():
            rounded = [x.astype(dtype) for x in arrays]
            exact = [x.astype(jnp.float32) for x in rounded]
            (direction,) = normal(7, jax.eval_shape(plain, *exact).shape)
            direction = direction.astype(dtype)
            expected = _output_and_gradients(plain, exact, direction.astype(jnp.float32))
            found = _output_and_gradients(fused, rounded, direction)
            assert all(b.dtype == dtype for b in found)
            for a, b in zip(expected, found, strict=True):
                error = jnp.abs(b.astype(jnp.float32) - a)
                measured = error.max() if dtype == "float32" else jnp.sqrt(jnp.mean(error**2))
                assert measured <= tolerance * (a.std() + 1e-3), (dtype, a.shape, measured / a.std())


def _output_and_gradients(
    function: Callable[..., jax.Array], arrays: Sequence[jax.Array], direction: jax.Array
) -> tuple[jax.Array, ...]:
    def both(arrays: Sequence[jax.Array], direction: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(function, *arrays)
        return out, *pull(direction)

    return jax.jit(both)(arrays, direction)


def compile_for_tpu(kind: str, function: Callable[..., jax.Array], *shapes: tuple[int, ...]) -> str:
    """The compiled text of output and gradients of a function of bfloat16 arrays, on two chips that split the first."""
    devices = tpu_devices(parse_topology(f"{kind}:2x2"))[:2]
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 1), ("data", "fsdp"))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    x, *others = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=whole) for s in shapes]
    given = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=split) for one in (x,)] + others

    def both(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out, pull = jax.vjp(function, *arrays)
            return out, *pull(out)

    return jax.jit(both).lower(*given).compile().as_text()
