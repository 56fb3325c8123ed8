"""TPUs by name: memory, speed, topologies, and abstract devices to compile for."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax

from halvit_jax.text import pip_install

GIB = 2**30


class Chip(NamedTuple):
    """One kind of TPU, from its vendor's figures except for `usable_bytes`.

    Memory, speed and bandwidth are per JAX device: a chip, or half a chip of tpu7x.
    """

    hbm_bytes: int
    usable_bytes: int  # for a program, from the out-of-memory message of libtpu 0.0.51
    peak_flops: float  # floating-point operations per second, bfloat16
    bandwidth: float  # bytes per second between the device and its HBM
    dimensions: int  # of a topology
    max_chips: int  # of the largest pod


CHIPS: dict[str, Chip] = {
    "v4": Chip(32 * GIB, int(30.75 * GIB), 275e12, 1228e9, 3, 4096),
    "v5e": Chip(16 * GIB, int(15.75 * GIB), 197e12, 819e9, 2, 256),
    "v5p": Chip(95 * GIB, int(95.73 * GIB), 459e12, 2765e9, 3, 8960),
    "v6e": Chip(32 * GIB, int(31.24 * GIB), 918e12, 1640e9, 2, 256),
    "tpu7x": Chip(96 * GIB, int(94.74 * GIB), 2307e12 / 2, 7380e9 / 2, 3, 9216),
}
TWO_CORES = {"v4", "v5p"}  # two cores on a chip are one device; libtpu calls that "megacore"


class Topology(NamedTuple):
    """Chips of one kind and their layout."""

    kind: str  # a key of CHIPS
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The figures of this kind."""
        return CHIPS[self.kind]

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """`v5e:4x4` -> Topology("v5e", (4, 4)).

    Raises:
        ValueError: not of this form, an unknown kind, or an impossible layout for this kind.
    """
    kinds = ", ".join(CHIPS)
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if match is None:
        raise ValueError(f"--topology={text!r} must be KIND:LAYOUT, e.g. v5e:4x4 or v4:2x2x4; kinds are {kinds}")
    if match[1] not in CHIPS:
        raise ValueError(f"--topology={text!r}: {match[1]!r} is an unknown kind of TPU; kinds are {kinds}")
    topology = Topology(match[1], tuple(map(int, match[2].split("x"))))
    chip, count = topology.chip, math.prod(topology.shape)
    if len(topology.shape) != chip.dimensions:
        example = f"{topology.kind}:{'x'.join(['4'] * chip.dimensions)}"
        raise ValueError(f"--topology={text!r} must have {chip.dimensions} lengths for this kind, e.g. {example}")
    if not 1 <= count <= chip.max_chips:
        raise ValueError(f"--topology={text!r} has {count} chips; {topology.kind} has 1 to {chip.max_chips}")
    if any(size > 1 and size % 2 for size in topology.shape):
        raise ValueError(f"--topology={text!r}: every length must be 1 or even, because a host holds 2x2 chips")
    return topology


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """Abstract devices to compile for; four chips make a host.

    Raises:
        ValueError: the compiler is not installed, or refuses this topology.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError(f"the TPU compiler is not installed; get it with: {pip_install('tpu')}")
    from jax.experimental.topologies import get_topology_desc

    # Without these libtpu waits for the metadata server of a TPU VM, and locks the TPU for one process at a time.
    defaults = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    defaults["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.kind in TWO_CORES else {}
    options["chips_per_host_bounds"] = (*(min(2, size) for size in topology.shape[:2]), 1)
    try:
        described = get_topology_desc(platform="tpu", topology_name=str(topology), **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={topology}: libtpu refuses it: {str(error).splitlines()[0]}") from error
    return list(described.devices)
