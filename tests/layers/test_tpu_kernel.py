import jax.numpy as jnp
import numpy as np

from halvit_jax.layers import tpu_kernel
from halvit_jax.layers.tpu_kernel import MIB


def test_a_step_has_images_that_divide_the_batch() -> None:
    given = [(8, 197), (8, 49), (6, 49), (7, 17), (8, 577), (1, 1)]
    assert [tpu_kernel.images_of_step(*one) for one in given] == [2, 4, 2, 1, 1, 1]


def test_arrays_are_padded_to_registers() -> None:
    assert tpu_kernel.padded_bytes((197, 64), jnp.float32) == 200 * 128 * 4
    assert tpu_kernel.padded_bytes((2, 197, 384), jnp.bfloat16) == 2 * 208 * 384 * 2
    assert tpu_kernel.padded_bytes((3,), jnp.float32) == 8 * 128 * 4


def test_a_kernel_must_fit_next_to_the_cores() -> None:
    assert tpu_kernel.memory_obstacle("TPU v5 lite", 70 * MIB) == ""
    assert "120 MiB of the 128 MiB" in tpu_kernel.memory_obstacle("TPU v5 lite", 80 * MIB)
    assert "not 'TPU v4'" in tpu_kernel.memory_obstacle("TPU v4", 1)
    assert tpu_kernel.compiler_params(MIB).vmem_limit_bytes == 16 * MIB
    assert tpu_kernel.compiler_params(20 * MIB).vmem_limit_bytes == 30 * MIB


def test_products_are_those_of_matrices() -> None:
    rng = np.random.default_rng(0)
    a, b = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32), jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)
    for found in (
        tpu_kernel.dot(a, b),
        tpu_kernel.dot(a, b.T, tpu_kernel.NT),
        tpu_kernel.dot(a.T, b, tpu_kernel.TN),
    ):
        np.testing.assert_allclose(found, a @ b, rtol=1e-5)
    assert tpu_kernel.dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)).dtype == jnp.float32
