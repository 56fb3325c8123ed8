"""Parameter paths such as `block0/ffn/tied/kernel`, and ordered rules over them.

A path is how decay rules, sharding rules, checkpoints, errors and reports name an array.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from halvit_jax.protocols import PyTree

T = TypeVar("T")


def path_of(key_path: Sequence[Any]) -> str:
    """The key path of a jax tree as words joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in key_path)


def flat(tree: PyTree) -> dict[str, Any]:
    """{path: leaf} in the order of the paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return dict(sorted((path_of(key_path), leaf) for key_path, leaf in leaves))


def map_paths(function: Callable[[str, Any], T], tree: PyTree) -> PyTree:
    """A tree of `function(path, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda key_path, leaf: function(path_of(key_path), leaf), tree)


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
    for path, leaf in flat(tree).items():
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
