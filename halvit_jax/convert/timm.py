"""timm's names of the states of Swin, PVTv2, Next-ViT and SHViT, as the official ones.

timm loads the official files and renames their entries; what it publishes has its own names. DeiT, ResNet and RegNet
have the same names in both. Each function renames one state and leaves one with official names as it is.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from halvit_jax.models.nextvit import NextViT
from halvit_jax.models.pvt_v2 import PVTv2
from halvit_jax.models.shvit import SHViT
from halvit_jax.models.swin import SwinTransformer

Names = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
"""(regular expression, replacement); each is applied to every name."""

SWIN: Names = (
    # timm merges patches before a stage, the official code after it.
    (r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) - 1}.downsample."),
    (r"^head\.fc\.", "head."),
)
PVT_V2: Names = (
    (r"^patch_embed\.", "patch_embed1."),
    (r"^stages\.(\d+)\.downsample\.", lambda found: f"patch_embed{int(found[1]) + 1}."),
    (r"^stages\.(\d+)\.blocks\.", lambda found: f"block{int(found[1]) + 1}."),
    (r"^stages\.(\d+)\.norm\.", lambda found: f"norm{int(found[1]) + 1}."),
    (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
)
# The official SHViT has one list a stage: two residual layers, the merging, two residual layers, then the blocks.
DOWNSAMPLE = ("0.0", "0.1", "1", "2.0", "2.1")
SHVIT: Names = (
    (r"^stages\.(\d+)\.downsample\.(\d+)\.", lambda found: f"blocks{int(found[1]) + 1}.{DOWNSAMPLE[int(found[2])]}."),
    (r"^stages\.0\.blocks\.", "blocks1."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda found: f"blocks{int(found[1]) + 1}.{int(found[2]) + 3}."),
)


def _next_vit(state: Iterable[str]) -> Names:
    """The official Next-ViT counts its blocks through all stages."""
    found = (re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name) for name in state)
    places = sorted({(int(place[1]), int(place[2])) for place in found if place})
    return (
        (r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda at: f"features.{places.index((int(at[1]), int(at[2])))}."),
        (r"\.mlp\.fc(\d)\.", r".mlp.conv\1."),
        (r"^head\.fc\.", "proj_head.0."),
    )


# Model -> (a name that only timm's states have, the renaming of a state).
NAMES: dict[type, tuple[str, Callable[[Iterable[str]], Names]]] = {
    SwinTransformer: (r"head\.fc\.|layers\.3\.downsample\.", lambda state: SWIN),
    PVTv2: (r"patch_embed\.", lambda state: PVT_V2),
    SHViT: (r"stages\.", lambda state: SHVIT),
    NextViT: (r"stages\.", _next_vit),
}


def official_names(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of this model with timm's names renamed; every other state as it is."""
    marker, names = NAMES.get(type(model), ("$^", lambda state: ()))
    if not any(re.match(marker, name) for name in state):
        return dict(state)
    rules, renamed = names(state), {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed
