"""Names of vision transformers: timm's and the official release's for DeiT, which are the same, and ours for HaLViT.

HaLViT has no published PyTorch ViT. Its tied matrices are named here as a PyTorch module of the same build would name
them: `blocks.0.attn.query_output.weight`, `blocks.0.attn.key_value.weight` and `blocks.0.mlp.tied.weight`, each
[out, in] of its forward direction.
"""

import numpy as np

from halvit_jax.convert.engine import Rule, conv, dense, layer_norm
from halvit_jax.models.vit import Position, VisionTransformer

_BLOCK, _OURS = "blocks.{i}", "block{i}"
_TIED = (
    *dense(f"{_BLOCK}.attn.query_output", f"{_OURS}/attention/query_output"),
    *dense(f"{_BLOCK}.attn.key_value", f"{_OURS}/attention/key_value"),
    *(
        Rule(f"{_BLOCK}.attn.{name}_bias", f"params/{_OURS}/attention/{name}_bias")
        for name in ("query", "key", "value", "output")
    ),
    *dense(f"{_BLOCK}.mlp.tied", f"{_OURS}/ffn/tied"),
    Rule(f"{_BLOCK}.mlp.hidden_bias", f"params/{_OURS}/ffn/hidden_bias"),
    Rule(f"{_BLOCK}.mlp.bias", f"params/{_OURS}/ffn/bias"),
)
RULES = (
    Rule("cls_token", "params/class_token", "token"),
    Rule("dist_token", "params/distill_token", "token"),
    Rule("pos_embed", "params/position/embedding", "position"),
    *conv("patch_embed.proj", "embed"),
    *layer_norm(f"{_BLOCK}.norm1", f"{_OURS}/attention_norm"),
    *dense(f"{_BLOCK}.attn.qkv", f"{_OURS}/attention/qkv"),
    *dense(f"{_BLOCK}.attn.proj", f"{_OURS}/attention/output"),
    *layer_norm(f"{_BLOCK}.norm2", f"{_OURS}/ffn_norm"),
    *dense(f"{_BLOCK}.mlp.fc1", f"{_OURS}/ffn/expand"),
    *dense(f"{_BLOCK}.mlp.fc2", f"{_OURS}/ffn/reduce"),
    *_TIED,
    *layer_norm("norm", "norm"),
    *dense("head", "head"),
    *dense("head_dist", "head_distill"),
)


def rules(model: VisionTransformer) -> tuple[Rule, ...]:
    """One table for all sizes; a rule without a path in the model is not used."""
    return RULES


def as_deit(model: VisionTransformer, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays, {path: array}, of the plain DeiT that computes what this model with these arrays computes.

    Queries, keys, values and output get the matrices (Wq, Wkv, Wkv^T) and Wq^T, the feed-forward layer W and W^T, the
    positions are written out as learned ones, and biases the model does not have are 0. For one that pools the mean of
    its tokens, timm's fields are class_token=False, global_pool="avg", fc_norm=False.
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
    """What the model adds to its tokens, [n, d]: it is added to zeros."""
    side = model.image_size // model.patch_size
    tokens = side**2 + (model.pool == "token") + model.distilled
    added = Position(model.position, (side, side)).apply({}, np.zeros((1, tokens, model.width), np.float32))
    return np.asarray(added)[0]
