"""Placement of arrays: the mesh of devices, rules for parameters, batches from host to devices.

The mesh has three axes: `data` (copies of the parameters, split batch), `fsdp` (split parameters, split batch) and
`tensor` (split parameters, whole batch). XLA derives the communication from the shardings.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from halvit_jax.protocols import Array, PyTree
from halvit_jax.trees import Axes, Rules, first_match, flatten, map_paths

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all); -1 takes the devices that the other axes leave.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    devices = list(jax.devices() if devices is None else devices)
    wrong = [f"mesh.{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
    free = [axis for axis, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and not wrong and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if wrong or len(free) > 1 or int(np.prod(list(sizes.values()))) != len(devices):
        given = " ".join(f"mesh.{axis}={size}" for axis, size in {"data": data, "fsdp": fsdp, "tensor": tensor}.items())
        raise ValueError(f"{given} must be positive, multiply to the {len(devices)} devices, and hold at most one -1")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch_size(batch_size: int, mesh: Mesh, *, accumulate: int = 1) -> None:
    """Refuse a global batch that the batch axes of the mesh and `accumulate` do not divide.

    Raises:
        ValueError: with the nearest batch sizes that fit.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    shares = devices * accumulate
    if batch_size % shares:
        below = batch_size // shares * shares
        fitting = " or ".join(str(size) for size in (below, below + shares) if size)
        parts = f" in loop.accumulate={accumulate} parts" if accumulate > 1 else ""
        raise ValueError(
            f"batch_size={batch_size} does not divide over mesh.data x mesh.fsdp = {devices} devices{parts}; set it to "
            f"{fitting}"
        )


def partition(tree: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """A tree of shardings: the first rule whose regex is found in a leaf's path names the mesh axes of each dimension.

    The paths of optimizer moments and EMA contain the parameter's path, so they are split like it. A scalar is
    replicated. A dimension is split over its axes in order, as long as they divide it.

    Raises:
        ValueError: an array that no rule names.
    """

    def place(path: str, leaf: Array) -> NamedSharding:
        axes = first_match(path, rules) if leaf.ndim else ()
        pairs = zip(axes, leaf.shape, strict=False)  # a rule may be shorter: the other dimensions are not split
        return NamedSharding(mesh, PartitionSpec(*(_fitting(wanted, size, mesh) for wanted, size in pairs)))

    return map_paths(place, tree)


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch -> the global batch, split over the batch axes."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def to_host(tree: PyTree) -> PyTree:
    """The tree as unsharded NumPy arrays, on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def broadcast_from_process_0(array: np.ndarray) -> np.ndarray:
    """The array of process 0, on all processes; a barrier for all of them."""
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def bytes_of(tree: PyTree) -> int:
    """Bytes of all arrays of a tree (or of their shapes), each counted once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in flatten(tree).values())


def _fitting(wanted: Axes, size: int, mesh: Mesh) -> Axes:
    names = (wanted,) if isinstance(wanted, str) else wanted or ()
    while names and size % math.prod(mesh.shape[name] for name in names):
        names = names[:-1]
    return names[0] if len(names) == 1 else names or None
