"""Names of Pyramid Vision Transformers: those of their authors, whai362/PVT (timm's PVTv2 nests the stages)."""

from halvit_jax.convert.engine import Rule, conv, dense, layer_norm
from halvit_jax.models.pvt import PVT, Pyramid

BLOCK, OURS = "block{i}.{j}", "stage{i}/block{j}"
RULES = (
    Rule("pos_embed{i}", "params/stage{i}/position", "position"),
    *conv("patch_embed{i}.proj", "stage{i}/embed"),
    *layer_norm("patch_embed{i}.norm", "stage{i}/embed_norm"),
    *layer_norm(f"{BLOCK}.norm1", f"{OURS}/attention_norm"),
    *dense(f"{BLOCK}.attn.q", f"{OURS}/attention/query"),
    *dense(f"{BLOCK}.attn.kv", f"{OURS}/attention/key_value"),
    *conv(f"{BLOCK}.attn.sr", f"{OURS}/attention/reduction"),
    *layer_norm(f"{BLOCK}.attn.norm", f"{OURS}/attention/reduction_norm"),
    *dense(f"{BLOCK}.attn.proj", f"{OURS}/attention/output"),
    *layer_norm(f"{BLOCK}.norm2", f"{OURS}/ffn_norm"),
    *dense(f"{BLOCK}.mlp.fc1", f"{OURS}/ffn/expand"),
    *conv(f"{BLOCK}.mlp.dwconv.dwconv", f"{OURS}/ffn/depthwise"),
    *dense(f"{BLOCK}.mlp.fc2", f"{OURS}/ffn/reduce"),
    *layer_norm("norm{i}", "stage{i}/norm"),
    *dense("head", "head"),
)


def rules(model: Pyramid) -> tuple[Rule, ...]:
    """The table of a model. The class token and the norm of PVT's last stage are named without its number."""
    if not isinstance(model, PVT):
        return RULES
    last = f"stage{len(model.depths)}"
    return Rule("cls_token", f"params/{last}/class_token", "token"), *layer_norm("norm", f"{last}/norm"), *RULES
