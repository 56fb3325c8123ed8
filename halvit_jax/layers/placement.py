"""Where the program that is being traced will run, and how a kernel is split over its devices.

XLA partitions its own operations, but no kernel of Pallas. A kernel therefore runs under `shard_map` on the rows of
each device. The mesh is the one that the training and evaluation steps set while they are traced.

Shapes: `b` batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

ROW_AXES = ("data", "fsdp")  # axes of a mesh over which a batch is split
ROWS = PartitionSpec(ROW_AXES)


class Place(NamedTuple):
    """The devices of a program."""

    platform: str  # cpu, gpu or tpu
    kind: str = ""  # e.g. "TPU v5 lite"
    rows: int = 1  # parts of the batch
    tensor: int = 1  # parts of the matrices


def current() -> Place:
    """The place of the program that is being traced: of its mesh, or without one this process's default device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if device is None:
        return Place(jax.default_backend(), jax.devices()[0].device_kind)
    rows = 1
    for axis in ROW_AXES:
        rows *= mesh.shape.get(axis, 1)
    return Place(device.platform, device.device_kind, rows, mesh.shape.get("tensor", 1))


def obstacle(place: Place, batch: int) -> str:
    """The reason why a kernel cannot run on the rows of each device, or ""."""
    if place.tensor > 1:
        return f"it needs whole matrices, not mesh.tensor={place.tensor}"
    if batch % place.rows:
        return f"{batch} rows do not divide over mesh.data x mesh.fsdp = {place.rows} devices"
    return ""


def over_rows(
    function: Callable[..., jax.Array], rows: Sequence[jax.Array], whole: Sequence[jax.Array] = ()
) -> jax.Array:
    """`function(*rows, *whole)` on the rows of each device: arrays [b, ...] split, those of `whole` entire -> [b, ...].

    The gradients of the entire arrays are summed over the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or _is_manual(mesh):
        return function(*rows, *whole)
    specs = (ROWS,) * len(rows) + (PartitionSpec(),) * len(whole)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=ROWS, check_vma=False)(*rows, *whole)


def _is_manual(mesh: AbstractMesh) -> bool:
    """Whether the program is already that of one device."""
    return AxisType.Manual in mesh.axis_types
