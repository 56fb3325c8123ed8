import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import classification
from helpers.shapes import shallow
from helpers.states import CUBE, RULES, small_optimizer
from helpers.tiers import KINDS, tiered
from jax.sharding import PartitionSpec as P

from halvit_jax.models import list_models
from halvit_jax.training.sharding import bytes_of, check_batch_size, make_mesh, partition, to_devices, to_host
from halvit_jax.training.state import abstract_state
from halvit_jax.trees import flatten


def _spec(path: str, *shape: int) -> P:
    return partition({path: jax.ShapeDtypeStruct(shape, jnp.float32)}, RULES, make_mesh(**CUBE))[path].spec


# The mesh.


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        (CUBE, (2, 2, 2)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 1, "tensor": -1}, (1, 1, 8)),
    ],
)
def test_the_mesh_holds_all_devices(sizes: dict[str, int], shape: tuple[int, ...]) -> None:
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("sizes", "given"),
    [
        ({"data": 3}, "mesh.data=3 mesh.fsdp=1 mesh.tensor=1"),
        ({"data": 16}, "mesh.data=16 mesh.fsdp=1 mesh.tensor=1"),
        ({"data": -1, "fsdp": 3}, "mesh.data=-1 mesh.fsdp=3 mesh.tensor=1"),
        ({"data": -1, "fsdp": -1}, "mesh.data=-1 mesh.fsdp=-1 mesh.tensor=1"),
        ({"data": 0, "fsdp": -1}, "mesh.data=0 mesh.fsdp=-1 mesh.tensor=1"),
        ({"data": -2, "fsdp": -4}, "mesh.data=-2 mesh.fsdp=-4 mesh.tensor=1"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes: dict[str, int], given: str) -> None:
    message = f"{given} must be positive, multiply to the 8 devices, and hold at most one -1"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mesh(**sizes)


@pytest.mark.parametrize(
    ("batch_size", "sizes", "message"),
    [
        (12, {}, "batch_size=12 does not divide over mesh.data x mesh.fsdp = 8 devices; set it to 8 or 16"),
        (5, {}, "batch_size=5 does not divide over mesh.data x mesh.fsdp = 8 devices; set it to 8"),
        (6, CUBE, "batch_size=6 does not divide over mesh.data x mesh.fsdp = 4 devices; set it to 4 or 8"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(batch_size: int, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_batch_size(batch_size, make_mesh(**sizes))
    check_batch_size(make_mesh(**sizes).shape["data"] * make_mesh(**sizes).shape["fsdp"] * 3, make_mesh(**sizes))


# Rules.


def test_the_first_rule_that_fits_names_the_axis_of_each_dimension() -> None:
    assert _spec("ffn/kernel", 4, 8) == P("fsdp", "tensor")
    assert _spec("special/kernel", 4, 8) == P("tensor")
    assert _spec("conv", 3, 3, 4, 8) == P(None, None, None, "fsdp")
    assert _spec("ffn/bias", 8) == P()


def test_a_dimension_that_its_axis_does_not_divide_stays_whole() -> None:
    assert _spec("ffn/kernel", 3, 8) == P(None, "tensor")
    assert _spec("ffn/kernel", 4, 9) == P("fsdp", None)


def test_a_dimension_is_split_over_as_many_of_its_axes_as_divide_it() -> None:
    assert _spec("wide/kernel", 3, 8) == P(None, ("tensor", "fsdp"))
    assert _spec("wide/kernel", 3, 6) == P(None, "tensor")
    assert _spec("wide/kernel", 3, 5) == P(None, None)


def test_a_scalar_is_whole_and_needs_no_rule() -> None:
    assert _spec("step") == P()


def test_an_array_that_no_rule_names_is_refused() -> None:
    with pytest.raises(ValueError, match="no rule for the parameter head/weight; the rules are"):
        _spec("head/weight", 4, 4)


@pytest.mark.parametrize("name", tiered(list_models(), KINDS))
def test_the_partition_rules_of_every_model_shard_most_of_its_state(name: str) -> None:
    task = classification(shallow(name))
    state = abstract_state(task, small_optimizer(), mesh=make_mesh(**CUBE), use_ema=True)
    params = flatten(state.params)
    followers = flatten(state)
    for path, leaf in params.items():
        for holder in ("params", "opt_state/1/mu", "opt_state/1/nu", "ema/params"):
            assert followers[f"{holder}/{path}"].sharding == leaf.sharding, path
    own = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in params.values())
    assert own <= 0.6 * sum(leaf.size for leaf in params.values())


@pytest.mark.parametrize("sizes", [{}, CUBE, {"data": 2, "fsdp": 4}])
def test_a_batch_is_split_by_rows_over_data_and_fsdp_and_copied_over_tensor(sizes: dict[str, int]) -> None:
    mesh = make_mesh(**sizes)
    rows = {"image": np.arange(16 * 3.0).reshape(16, 3), "mask": np.arange(16) % 3 == 0}
    batch = to_devices(rows, mesh)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, array in batch.items():
        np.testing.assert_array_equal(array, rows[name])
        for shard in array.addressable_shards:
            position = np.argwhere(mesh.devices == shard.device)[0]
            share = position[0] * mesh.shape["fsdp"] + position[1]
            expected = rows[name].reshape(shares, 16 // shares, *rows[name].shape[1:])[share]
            np.testing.assert_array_equal(shard.data, expected)


def test_to_host_gives_whole_numpy_arrays() -> None:
    rows = {"a": np.arange(16.0, dtype=np.float32)}
    back = to_host(to_devices(rows, make_mesh(**CUBE)))
    assert type(back["a"]) is np.ndarray
    np.testing.assert_array_equal(back["a"], rows["a"])


def test_bytes_count_each_array_once_whatever_its_copies() -> None:
    tree = {"a": np.zeros((8, 3), np.float32), "b": np.zeros(8, np.int8)}
    assert bytes_of(tree) == bytes_of(to_devices(tree, make_mesh(**CUBE))) == 8 * 3 * 4 + 8
    assert bytes_of(jax.eval_shape(lambda: tree)) == 104
