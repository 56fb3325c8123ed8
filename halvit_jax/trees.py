"""Pytrees by path: `block0/ffn/tied/kernel` names an array in rules, checkpoints, errors and reports."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from halvit_jax.protocols import PyTree

T = TypeVar("T")
Axes = tuple[str, ...] | str | None  # mesh axes that one dimension is split over, outermost first
Rules = Sequence[tuple[str, tuple[Axes, ...]]]
"""Partition rules: (regex of a parameter path, mesh axis or axes of each dimension), first match wins."""
TransferRules = Sequence[tuple[str, str]]
"""(regex of a parameter path, how an array of another shape is adapted there), see `convert.transfer`."""


def path_of(key_path: Sequence[Any]) -> str:
    """The key path of a jax tree as words joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in key_path)


def flatten(tree: PyTree) -> dict[str, Any]:
    """{path: leaf} in the order of the paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return dict(sorted((path_of(key_path), leaf) for key_path, leaf in leaves))


def unflatten(leaves: Mapping[str, T]) -> dict[str, Any]:
    """{"params/head/bias": leaf} -> {"params": {"head": {"bias": leaf}}}.

    Raises:
        ValueError: a path that continues another.
    """
    tree: dict[str, Any] = {}
    for path, leaf in sorted(leaves.items()):
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path} lies below an array")
        node[name] = leaf
    return tree


def map_paths(function: Callable[[str, Any], T], tree: PyTree) -> PyTree:
    """A tree of `function(path, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda key_path, leaf: function(path_of(key_path), leaf), tree)


def natural_key(path: str) -> list[str | int]:
    """A sort key that puts block10 after block9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def first_match(path: str, rules: Sequence[tuple[str, T]]) -> T:
    """The value of the first rule whose regular expression is found in the path.

    Raises:
        ValueError: no rule fits.
    """
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    raise ValueError(f"no rule for the parameter {path}; the rules are {[pattern for pattern, _ in rules]}")


def count(tree: PyTree) -> int:
    """The number of scalars in a tree of arrays."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


def sha256(tree: PyTree) -> str:
    """One digest over the names, shapes, types and bytes of all arrays, in path order."""
    digest = hashlib.sha256()
    for path, leaf in flatten(tree).items():
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def variable_shapes(model: Any) -> PyTree:
    """The variables of a Flax model, for images of its size and channels, as shapes; nothing is computed."""
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, model.in_channels), "float32")
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
