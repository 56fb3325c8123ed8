"""Non-finite values: flags computed in the training step, and a bundle to debug from.

Every step flags its loss, gradients and statistics; the whole state is flagged every few steps and before a save. The
loop reads one scalar of the previous step, so nothing waits.
"""

import io
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from halvit_jax.protocols import Array, PyTree
from halvit_jax.storage import Path
from halvit_jax.text import first_few
from halvit_jax.trees import flatten


class NotFiniteError(ArithmeticError):
    """The loss, a gradient or the state holds NaN or infinity; the message names which."""


def finite_flags(parts: Mapping[str, PyTree]) -> dict[str, Array]:
    """{"parts/path": whether all of it is finite} for the floating-point arrays of all parts."""
    leaves = flatten(dict(parts))
    return {path: jnp.isfinite(x).all() for path, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.floating)}


def all_finite(flags: Mapping[str, Array]) -> Array:
    """True if every array is finite."""
    return jnp.stack(list(flags.values())).all()


def global_norm(tree: PyTree) -> Array:
    """The Euclidean norm of all arrays of a tree together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def raise_if_not_finite(step: int, finite: Mapping[str, Array]) -> None:
    """Read the flags of a step.

    Raises:
        NotFiniteError: naming the arrays that are not finite, the loss first, then gradients, then the state.
    """
    bad = not_finite(finite)
    if not bad:
        return
    raise NotFiniteError(f"not finite at step {step}: {first_few(bad)}")


def not_finite(finite: Mapping[str, Array]) -> list[str]:
    """Paths of the arrays that are not finite, causes first: loss, gradients, statistics, the rest of the state."""
    bad = [path for path, good in jax.device_get(dict(finite)).items() if not good]
    order = {"loss": 0, "gradient": 1, "model_state": 2}
    return sorted(bad, key=lambda path: order.get(path.split("/")[0], 3))


def write_bundle(
    folder: Path, step: int, finite: Mapping[str, Array], batches: Mapping[int, Mapping[str, Array]]
) -> None:
    """Write all paths that are not finite and this host's last batches, to debug from."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, batch in batches.items():
        rows = {name: np.concatenate([shard.data for shard in x.addressable_shards]) for name, x in batch.items()}
        content = io.BytesIO()
        np.savez(content, **rows)
        (folder / f"batch_{number}_{jax.process_index()}.npz").write_bytes(content.getvalue())
    if jax.process_index() == 0:
        facts = {"step": step, "not_finite": not_finite(finite), "batches": sorted(batches)}
        (folder / "report.json").write_text(json.dumps(facts, indent=2) + "\n")
