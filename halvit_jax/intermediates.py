"""What a model computes on its way: attention maps and the outputs of its blocks.

found = halvit_jax.capture(model, variables, images, ("attention", "blocks"))
found["attention"]["block0"]   # [b, h, n, n], rows sum to 1
found["blocks"]["block0"]      # [b, n, d]; of a ResNet ["stage1/block0"], [b, h, w, c]

The maps of a stage, by their stride against the image, are `model.apply(..., method="features")`.

Shapes: `b` batch, `h` heads, `n` tokens, `d` width.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

# Name -> where Flax keeps it below "intermediates", the group being what it is called here.
CAPTURES = {"attention": r"(.*)/attention/weights", "blocks": r"(.*block\d+)/__call__"}


def capture(
    model: nn.Module, variables: Mapping[str, Any], images: jax.Array, names: Sequence[str] = ("attention",)
) -> dict[str, dict[str, jax.Array]]:
    """{name: {block: array}} for each of `names`, keys of CAPTURES; normalised images [b, h, w, 3].

    Raises:
        ValueError: another name, or one that this model has nothing of.
    """
    for name in names:
        if name not in CAPTURES:
            raise ValueError(f"capture={name!r} is not one of {', '.join(CAPTURES)}")
    _, state = model.apply(
        variables,
        images,
        train=False,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: re.fullmatch(r"block\d+", module.name or "") is not None,
    )
    leaves = jax.tree_util.tree_flatten_with_path(state["intermediates"])[0]
    kept = {"/".join(str(key.key) for key in path[:-1]): leaf for path, leaf in leaves}
    found = {}
    for name in names:
        matches = {re.fullmatch(CAPTURES[name], path): array for path, array in kept.items()}
        found[name] = {match[1]: array for match, array in matches.items() if match}
        if not found[name]:
            raise ValueError(f"capture={name!r}: {type(model).__name__} has none")
    return found
