"""Names of Swin Transformers: Microsoft's own (timm moves the merging of patches).

Their files also hold indices and masks, which follow from the model's shape and are not read or written.
"""

from halvit_jax.convert.engine import CACHE, Rule, conv, dense, layer_norm
from halvit_jax.convert.vit import matrices
from halvit_jax.models.swin import SwinTransformer


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
        Rule(f"{source}.attn.relative_position_bias_table", path),
        Rule(f"{source}.attn.relative_position_index", path, CACHE),
        Rule(f"{source}.attn_mask", path, CACHE),
    )
