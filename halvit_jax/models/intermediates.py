"""Intermediate arrays of a model: attention maps and the outputs of its blocks.

found = halvit_jax.capture(model, variables, images, ("attention", "blocks"))
found["attention"]["block0"]   # [b, h, n, n], rows sum to 1
found["blocks"]["block0"]      # [b, n, d]; of a ResNet ["stage1/block0"], [b, h, w, c]

The order is that of the blocks. A block that runs several times (MiniViT) has "block0/repeat0", "block0/repeat1", ...
Attention in windows (Swin) has the windows of each image, row by row: [b m, h, n, n]. Attention over fewer keys than
tokens (PVT) has a column for each key.

`model.apply(..., method="features")` gives the maps of the stages, by their stride.

Shapes: `b` batch, `h` heads, `n` tokens, `d` width, `m` windows.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from halvit_jax.trees import flatten, natural_key

# Name -> its path below "intermediates"; the group is the key in the result.
CAPTURES = {"attention": r"(.*)/attention/weights", "blocks": r"(.*(?:block|repeat)\d+)/__call__"}


def capture(
    model: nn.Module, variables: Mapping[str, Any], images: jax.Array, names: Sequence[str] | str = ("attention",)
) -> dict[str, dict[str, jax.Array]]:
    """{name: {block: array}} for each of `names`, keys of CAPTURES; normalised images [b, h, w, 3].

    Raises:
        ValueError: an unknown name, or one without intermediates in this model.
    """
    names = (names,) if isinstance(names, str) else names
    for name in names:
        if name not in CAPTURES:
            raise ValueError(f"capture={name!r} is not one of {', '.join(CAPTURES)}")
    _, state = model.apply(
        variables,
        images,
        train=False,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: re.fullmatch(r"(block|repeat)\d+", module.name or "") is not None,
    )
    leaves = flatten(state["intermediates"])
    sown: dict[str, list[jax.Array]] = {}
    for path in sorted(leaves, key=natural_key):
        sown.setdefault(path.rpartition("/")[0], []).append(leaves[path])
    found: dict[str, dict[str, jax.Array]] = {}
    for name in names:
        found[name] = {}
        for path, arrays in sown.items():
            match = re.fullmatch(CAPTURES[name], path)
            if match and len(arrays) == 1:
                found[name][match[1]] = arrays[0]
            elif match:
                found[name] |= {f"{match[1]}/repeat{i}": array for i, array in enumerate(arrays)}
        if not found[name]:
            raise ValueError(f"capture={name!r}: {type(model).__name__} has none")
    return found
