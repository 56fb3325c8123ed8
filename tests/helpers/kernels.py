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
            expected, pull = jax.vjp(plain, *exact)
            (direction,) = normal(7, expected.shape)
            direction = direction.astype(dtype)
            found, pull_fused = jax.vjp(fused, *rounded)
            assert found.dtype == dtype
            pairs = zip((expected, *pull(direction.astype(jnp.float32))), (found, *pull_fused(direction)), strict=True)
            for a, b in pairs:
                error = jnp.abs(b.astype(jnp.float32) - a)
                measured = error.max() if dtype == "float32" else jnp.sqrt(jnp.mean(error**2))
                assert measured <= tolerance * (a.std() + 1e-3), (dtype, a.shape, measured / a.std())


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
