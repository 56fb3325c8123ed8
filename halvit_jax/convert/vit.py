"""Names of vision transformers: timm's for DeiT, the same as in the official release, and ours for HaLViT.

HaLViT has no published PyTorch ViT. We name its tied matrices as an equivalent PyTorch module would:
`blocks.0.attn.query_output.weight`, `blocks.0.attn.key_value.weight` and `blocks.0.mlp.tied.weight`, each [out, in] of
its forward direction.
"""

import numpy as np

from halvit_jax.convert.engine import Rule, conv, dense, layer_norm
from halvit_jax.layers.embed import PositionEmbedding
from halvit_jax.models.vit import VisionTransformer


def matrices(source: str, target: str) -> tuple[Rule, ...]:
    """The attention and the feed-forward layer of a block, of any kind."""
    return (
        *dense(f"{source}.attn.qkv", f"{target}/attention/qkv"),
        *dense(f"{source}.attn.proj", f"{target}/attention/output"),
        *dense(f"{source}.mlp.fc1", f"{target}/ffn/expand"),
        *dense(f"{source}.mlp.fc2", f"{target}/ffn/reduce"),
        *dense(f"{source}.attn.query_output", f"{target}/attention/query_output"),
        *dense(f"{source}.attn.key_value", f"{target}/attention/key_value"),
        *(
            Rule(f"{source}.attn.{name}_bias", f"params/{target}/attention/{name}_bias")
            for name in ("query", "key", "value", "output")
        ),
        *dense(f"{source}.mlp.tied", f"{target}/ffn/tied"),
        Rule(f"{source}.mlp.hidden_bias", f"params/{target}/ffn/hidden_bias"),
        Rule(f"{source}.mlp.bias", f"params/{target}/ffn/bias"),
    )


RULES = (
    Rule("cls_token", "params/class_token", "token"),
    Rule("dist_token", "params/distill_token", "token"),
    Rule("pos_embed", "params/position/embedding", "position"),
    *conv("patch_embed.proj", "embed"),
    *layer_norm("blocks.{i}.norm1", "block{i}/attention_norm"),
    *layer_norm("blocks.{i}.norm2", "block{i}/ffn_norm"),
    *matrices("blocks.{i}", "block{i}"),
    *layer_norm("norm", "norm"),
    *dense("head", "head"),
    *dense("head_dist", "head_distill"),
)


def rules(model: VisionTransformer) -> tuple[Rule, ...]:
    """One table for all sizes; a rule without a path in the model is not used."""
    return RULES


def as_deit(model: VisionTransformer, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays, {path: array}, of the plain DeiT with the same outputs.

    The matrices are (Wq, Wkv, Wkv^T) and Wq^T in attention, and W and W^T in the feed-forward layer. Positions become
    learned ones, and missing biases are 0. With `pool` "mean", timm's fields are class_token=False, global_pool="avg",
    fc_norm=False.
    """
    arrays = dict(arrays)
    for i in range(model.depth):
        _untie_attention(arrays, f"params/block{i}/attention", model.width)
        _untie_ffn(arrays, f"params/block{i}/ffn")
    if model.position != "learned":
        arrays["params/position/embedding"] = _positions(model)
    return arrays


def _untie_attention(arrays: dict[str, np.ndarray], path: str, width: int) -> None:
    if f"{path}/query_output/kernel" in arrays:
        query_output = arrays.pop(f"{path}/query_output/kernel")
        key_value = arrays.pop(f"{path}/key_value/kernel")
        arrays[f"{path}/qkv/kernel"] = np.concatenate([query_output, key_value, key_value.T], axis=1)
        arrays[f"{path}/output/kernel"] = query_output.T
    if f"{path}/query_bias" in arrays:
        biases = [arrays.pop(f"{path}/{name}_bias") for name in ("query", "key", "value")]
        arrays[f"{path}/qkv/bias"] = np.concatenate(biases)
        arrays[f"{path}/output/bias"] = arrays.pop(f"{path}/output_bias")
    arrays.setdefault(f"{path}/qkv/bias", np.zeros(3 * width, np.float32))
    arrays.setdefault(f"{path}/output/bias", np.zeros(width, np.float32))


def _untie_ffn(arrays: dict[str, np.ndarray], path: str) -> None:
    if f"{path}/tied/kernel" in arrays:
        kernel = arrays.pop(f"{path}/tied/kernel")
        arrays[f"{path}/expand/kernel"], arrays[f"{path}/reduce/kernel"] = kernel, kernel.T
        arrays[f"{path}/expand/bias"] = arrays.pop(f"{path}/hidden_bias")
        arrays[f"{path}/reduce/bias"] = arrays.pop(f"{path}/bias")


def _positions(model: VisionTransformer) -> np.ndarray:
    """The position embedding of the model's tokens, [n, d]."""
    side = model.image_size // model.patch_size
    tokens = side**2 + (model.pool == "token") + model.distilled
    added = PositionEmbedding(model.position, (side, side)).apply({}, np.zeros((1, tokens, model.width), np.float32))
    return np.asarray(added)[0]
