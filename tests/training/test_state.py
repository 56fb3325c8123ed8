"""The train state: fresh, in its shardings, and with loaded arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers.states import CUBE, RULES, small_optimizer

from halvit_jax.training.sharding import make_mesh
from halvit_jax.training.state import TrainState, abstract_state, init_state
from halvit_jax.trees import flatten


class Noise:
    """Of a task only what a fresh state needs."""

    partition_rules = RULES

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        return {"kernel": jax.random.normal(key, (16, 64)), "bias": jnp.zeros(64)}, {"seen": {"bias": jnp.ones(3)}}


def _fresh(seed: int = 0, *, use_ema: bool = False, **sizes: int) -> tuple[TrainState, TrainState]:
    """The abstract state and the fresh one."""
    abstract = abstract_state(Noise(), small_optimizer(), mesh=make_mesh(**sizes), use_ema=use_ema)
    return abstract, init_state(Noise(), small_optimizer(), abstract, seed=seed, use_ema=use_ema)


def test_a_fresh_state_is_created_in_its_shardings() -> None:
    abstract, state = _fresh(use_ema=True, **CUBE)

    def described(tree: TrainState) -> dict[str, Any]:
        return {path: (leaf.shape, leaf.dtype, leaf.sharding) for path, leaf in flatten(tree).items()}

    assert described(state) == described(abstract)
    assert int(state.step) == 0
    assert {shard.data.shape for shard in state.params["kernel"].addressable_shards} == {(8, 32)}


def test_averages_start_as_copies_with_buffers_of_their_own() -> None:
    _, state = _fresh(use_ema=True)
    trained, averages = flatten(state.trained), flatten(state.ema)
    assert trained.keys() == averages.keys()
    values = {path: np.array(leaf) for path, leaf in trained.items()}
    for leaf in trained.values():
        leaf.delete()
    for path, average in averages.items():
        np.testing.assert_array_equal(average, values[path])


def test_the_seed_decides_the_fresh_values_whatever_the_mesh() -> None:
    first, split, other = (
        np.asarray(_fresh(seed, **sizes)[1].params["kernel"]) for seed, sizes in ((0, {}), (0, CUBE), (1, {}))
    )
    np.testing.assert_array_equal(first, split)
    assert (first != other).any()
