"""Is everything finite? Flags made on the device in the training step, and the limit on sudden gradients.

Every step flags its loss, gradients and statistics; the whole state is flagged every few steps and before a save. The
loop reads one scalar of the step before, so that nothing waits. `Limit` leaves the updates of single bad batches out,
counted and bounded.
"""

import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from halvit_jax.protocols import Array, PyTree
from halvit_jax.text import first_few
from halvit_jax.trees import flatten


class NotFiniteError(ArithmeticError):
    """The loss, a gradient or the state holds NaN or infinity; the message names which."""


def flags(parts: Mapping[str, PyTree]) -> dict[str, Array]:
    """{"parts/path": whether all of it is finite} for the floating-point arrays of all parts."""
    leaves = flatten(dict(parts))
    return {path: jnp.isfinite(x).all() for path, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.floating)}


def all_up(flags: Mapping[str, Array]) -> Array:
    """Whether all flags are up."""
    return jnp.stack(list(flags.values())).all()


def norm(tree: PyTree) -> Array:
    """The Euclidean norm of all arrays of a tree together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def check(step: int, finite: Mapping[str, Array]) -> None:
    """Read the flags of a step.

    Raises:
        NotFiniteError: naming the arrays that are not finite, the loss first, then gradients, then the state.
    """
    bad = not_finite(finite)
    if not bad:
        return
    raise NotFiniteError(f"not finite at step {step}: {first_few(bad)}")


def not_finite(finite: Mapping[str, Array]) -> list[str]:
    """The paths whose flag is down, causes first: the loss, gradients, statistics, and the rest of the state."""
    bad = [path for path, good in jax.device_get(dict(finite)).items() if not good]
    order = {"loss": 0, "gradient": 1, "model_state": 2}
    return sorted(bad, key=lambda path: order.get(path.split("/")[0], 3))


def write_bundle(
    folder: pathlib.Path, step: int, finite: Mapping[str, Array], batches: Mapping[int, Mapping[str, Array]]
) -> None:
    """What there is to look at after a run that was not healthy: all bad paths, and this host's last batches."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, batch in batches.items():
        rows = {name: np.concatenate([shard.data for shard in x.addressable_shards]) for name, x in batch.items()}
        np.savez(folder / f"batch_{number}_{jax.process_index()}.npz", **rows)
    if jax.process_index() == 0:
        facts = {"step": step, "not_finite": not_finite(finite), "batches": sorted(batches)}
        (folder / "report.json").write_text(json.dumps(facts, indent=2) + "\n")
