import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.training.checkpoint.digests import digests
from halvit_jax.training.sharding import AXES, make_mesh

DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool")


def _array(dtype: str, shape: tuple[int, ...] = (8, 4, 3)) -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8)
    return bits[..., 0] > 127 if dtype == "bool" else bits.view(jnp.dtype(dtype)).reshape(shape)


def _digest(array: np.ndarray) -> str:
    return digests({"a": array})["a"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_of_every_element_shows(dtype: str) -> None:
    array = _array(dtype, (5, 3))
    seen = {_digest(array)}
    raw = array.view(np.uint8)
    bits = 1 if dtype == "bool" else 8
    for place in np.ndindex(raw.shape):
        for bit in range(bits):
            raw[place] ^= 1 << bit
            seen.add(_digest(array))
            raw[place] ^= 1 << bit
    assert len(seen) == 1 + raw.size * bits


def test_order_length_and_sign_of_zero_count() -> None:
    array = _array("float32")
    others = [array[::-1].copy(), array.reshape(4, 8, 3), np.where(array == array[0, 0, 0], 0, array)]
    zeros = [np.zeros(4, np.float32), -np.zeros(4, np.float32), np.zeros(5, np.float32)]
    # The bytes of a reshaped array are the same, and so is its digest: its shape is compared beside it.
    assert len({_digest(x) for x in [array, *others, *zeros]}) == 6
    assert _digest(array) == _digest(others[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_on_any_mesh(dtype: str) -> None:
    array = _array(dtype)
    whole = _digest(array)
    for sizes in [(8, 1, 1), (2, 2, 2), (1, 4, 2)]:
        mesh = make_mesh(**dict(zip(AXES, sizes, strict=True)))
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), "tensor"))
        assert _digest(jax.device_put(array, split)) == whole


def test_a_scalar_an_empty_array_and_eight_bytes_an_element() -> None:
    assert _digest(np.float32(1.0)) != _digest(np.float32(2.0))
    assert _digest(np.zeros((0, 3), np.float32)) == "0" * 16
    with jax.enable_x64(True):
        assert _digest(np.float64([1.0, 2.0])) != _digest(np.float64([1.0, 2.0 + 1e-15]))
