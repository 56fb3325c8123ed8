from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import struct

from halvit_jax.trees import count, first_match, flatten, map_paths, natural_key, sha256, unflatten, variable_shapes


@struct.dataclass
class State:
    params: Any
    moments: Any


class Moments(NamedTuple):
    mu: Any
    nu: Any


TREE = State(params={"b": {"kernel": np.ones((2, 3))}, "a": np.zeros(4)}, moments=(Moments(np.ones(1), np.ones(())),))
PATHS = ["moments/0/mu", "moments/0/nu", "params/a", "params/b/kernel"]


def test_paths_name_keys_fields_and_places_and_come_in_order() -> None:
    assert list(flatten(TREE)) == PATHS
    assert flatten(TREE)["params/b/kernel"] is TREE.params["b"]["kernel"]


def test_map_paths_keeps_the_structure() -> None:
    named = map_paths(lambda path, leaf: (path, leaf.shape), TREE)
    assert named.params == {"b": {"kernel": ("params/b/kernel", (2, 3))}, "a": ("params/a", (4,))}
    assert named.moments[0].nu == ("moments/0/nu", ())


def test_unflatten_undoes_flatten() -> None:
    tree = {"params": {"a": {"kernel": np.ones(2)}, "b": np.zeros(1)}, "batch_stats": {"mean": np.ones(1)}}
    leaves = flatten(tree)
    assert list(leaves) == ["batch_stats/mean", "params/a/kernel", "params/b"]
    again = unflatten(leaves)
    assert again["params"]["a"]["kernel"] is tree["params"]["a"]["kernel"]
    assert jax.tree.structure(again) == jax.tree.structure(tree)


def test_unflatten_refuses_a_path_below_an_array() -> None:
    with pytest.raises(ValueError, match="a/b lies below an array"):
        unflatten({"a": np.ones(1), "a/b": np.ones(1)})


def test_natural_key_sorts_numbers_by_value() -> None:
    paths = ["block10/repeat0", "block9/repeat10", "block9", "block9/repeat9", "head"]
    assert sorted(paths, key=natural_key) == ["block9", "block9/repeat9", "block9/repeat10", "block10/repeat0", "head"]


def test_variable_shapes_are_those_of_the_models_own_images() -> None:
    class Model(nn.Module):
        image_size: int = 4
        in_channels: int = 2

        @nn.compact
        def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
            return nn.Dense(2, name="head")(images.reshape(len(images), -1))

    shapes = {path: leaf.shape for path, leaf in flatten(variable_shapes(Model())).items()}
    assert shapes == {"params/head/bias": (2,), "params/head/kernel": (4 * 4 * 2, 2)}


def test_the_first_rule_that_fits_wins() -> None:
    rules = [("kernel$", 1), ("ffn", 2), ("", 3)]
    assert [first_match(path, rules) for path in ("ffn/kernel", "ffn/bias", "head/bias")] == [1, 2, 3]


def test_a_path_without_a_rule_is_named_with_the_rules() -> None:
    with pytest.raises(ValueError, match=r"no rule for the parameter head/bias; the rules are \['kernel\$', 'ffn'\]"):
        first_match("head/bias", [("kernel$", 1), ("ffn", 2)])


def test_count_adds_up_all_scalars() -> None:
    assert count(TREE) == 6 + 4 + 1 + 1
    assert count(jax.eval_shape(lambda: TREE)) == 12


def test_the_digest_is_of_names_shapes_types_and_values() -> None:
    tree = {"a": np.arange(4.0, dtype=np.float32), "b": {"c": np.ones((2, 2), np.int32)}}
    digest = sha256(tree)
    assert digest == sha256({"b": dict(tree["b"]), "a": tree["a"].copy()})
    assert digest == sha256(jax.tree.map(jnp.asarray, tree))
    others = [
        tree | {"a": np.array([0.0, 1.0, 2.0, np.nextafter(np.float32(3), np.float32(4))], np.float32)},
        tree | {"a": tree["a"].reshape(2, 2)},
        tree | {"a": tree["a"].astype(np.float64)},
        {"x": tree["a"], "b": tree["b"]},
        {"a": tree["a"]},
    ]
    assert len({digest, *map(sha256, others)}) == 1 + len(others)


def test_the_digest_reads_an_array_in_its_own_order() -> None:
    array = np.arange(6.0).reshape(2, 3)
    assert sha256({"a": array.T}) == sha256({"a": array.T.copy()}) != sha256({"a": array.reshape(3, 2)})
