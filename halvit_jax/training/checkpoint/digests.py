"""Digests of sharded arrays, computed on their devices; the same on any mesh, so any restored state can be verified.

Every element's bits are mixed with its position in the whole array and the results are added modulo 2^32, twice with
different constants. Integer sums do not depend on their order, so nothing is gathered; the mixing is a bijection for
each position, so a single wrong element always shows, and any other corruption with probability 1 - 2^-64. This detects
corruption, not tampering.
"""

import jax
import jax.numpy as jnp
import numpy as np

from halvit_jax.protocols import Array, PyTree
from halvit_jax.trees import flatten

LANES = (0x9E3779B9, 0x85EBCA6B)  # one constant for each of the two sums
BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digests(tree: PyTree) -> dict[str, str]:
    """{path: 16 hexadecimal digits} of all arrays of a tree; waits until they are computed."""
    sums = {}
    for path, array in flatten(tree).items():
        sums[path] = _sums(array)
        if jax.default_backend() == "cpu":  # where many small programs that exchange something may block each other
            sums[path].block_until_ready()
    return {path: "".join(f"{int(word):08x}" for word in np.asarray(words)) for path, words in sums.items()}


@jax.jit
def _sums(array: Array) -> Array:
    """The two sums of an array, uint32 [2]."""
    bits = _bits(array)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(
        bits.shape
    ):  # row-major position, computed axis by axis so that it is sharded like the array
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = [_mix(bits ^ _mix(place + jnp.uint32(lane))) for lane in LANES]
    return jnp.stack([jnp.sum(lane, dtype=jnp.uint32) for lane in mixed])


def _bits(array: Array) -> Array:
    """The bits of an array as uint32; an element of 8 bytes becomes two along a last axis of their own."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    size = array.dtype.itemsize
    return jax.lax.bitcast_convert_type(array, BITS[min(size, 4)]).astype(jnp.uint32)


def _mix(x: Array) -> Array:
    """The finaliser of MurmurHash3: a bijection of 32 bits in which every bit of the input moves every other."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
