"""Names of Swin Transformers: Microsoft's own (timm moves the merging of patches).

Their files also hold indices and masks, which follow from the model's shape and are not read or written.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from halvit_jax.convert.engine import CACHE, Rule, conv, dense, layer_norm
from halvit_jax.convert.vit import matrices
from halvit_jax.models.swin import SwinTransformer

TABLE = "relative_position_bias_table"


def rules(model: SwinTransformer) -> tuple[Rule, ...]:
    """The table of a model, which depends on the number of its stages."""
    table = list(frame(model))
    for i in range(len(model.depths)):
        source, target = f"layers.{i}.blocks.{{i}}", f"stage{i + 1}/block{{i}}"
        table += layer_norm(f"{source}.norm1", f"{target}/attention_norm")
        table += layer_norm(f"{source}.norm2", f"{target}/ffn_norm")
        table += window_attention(source, target)
    return tuple(table)


def frame(model: SwinTransformer) -> tuple[Rule, ...]:
    """All but the blocks. The merging of patches ends a stage there and starts the next one here."""
    table = [*conv("patch_embed.proj", "embed"), *layer_norm("patch_embed.norm", "embed_norm")]
    for i in range(len(model.depths) - 1):
        table += layer_norm(f"layers.{i}.downsample.norm", f"stage{i + 2}/merge/norm")
        table += dense(f"layers.{i}.downsample.reduction", f"stage{i + 2}/merge/reduce")
    return *table, *layer_norm("norm", "norm"), *dense("head", "head")


def window_attention(source: str, target: str) -> tuple[Rule, ...]:
    """The matrices of a block and its table of relative positions."""
    path = f"params/{target}/position_bias/table"
    return (
        *matrices(source, target),
        Rule(f"{source}.attn.{TABLE}", path),
        Rule(f"{source}.attn.relative_position_index", path, CACHE),
        Rule(f"{source}.attn_mask", path, CACHE),
    )


def check_windows(name: str, model: SwinTransformer, state: Mapping[str, Any]) -> None:
    """Refuse weights with another window size, such as those at 384 pixels for a model with windows of 7 tokens.

    Raises:
        ValueError: with the `window_size` to set.
    """
    rows = [np.shape(array)[0] for key, array in state.items() if key.endswith(TABLE) and np.ndim(array) == 2]
    found = (math.isqrt(max(rows, default=0)) + 1) // 2  # a table has (2 window - 1)^2 rows
    side = model.image_size // model.patch_size
    if rows and found != model.window_size and found <= side:
        raise ValueError(
            f"these weights do not fit {name}: they have windows of {found} tokens, the model of image_size="
            f"{model.image_size} has model.window_size={model.window_size}; set window_size={found}"
        )
