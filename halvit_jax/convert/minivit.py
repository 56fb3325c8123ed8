"""Names of Mini-DeiT and Mini-Swin: the authors' (github.com/microsoft/Cream, MiniViT).

Both keep the unshared arrays of each run of a shared block in lists; Mini-DeiT wraps them in `instances`.
"""

from halvit_jax.convert.engine import Rule, conv, dense, layer_norm
from halvit_jax.convert.swin import frame, window_attention
from halvit_jax.convert.vit import matrices
from halvit_jax.models.minivit import MiniDeit, MiniSwin

_SOURCE, _BLOCK, _REPEAT = "blocks.{i}.block", "block{i}", "block{i}/repeat{k}"
_DEIT = (
    Rule("cls_token", "params/class_token", "token"),
    Rule("dist_token", "params/distill_token", "token"),
    Rule("pos_embed", "params/position/embedding", "position"),
    *conv("patch_embed.proj", "embed"),
    *layer_norm(f"{_SOURCE}.norm1.instances.{{k}}", f"{_REPEAT}/attention_norm"),
    *layer_norm(f"{_SOURCE}.norm2.instances.{{k}}", f"{_REPEAT}/ffn_norm"),
    Rule(f"{_SOURCE}.attn.rpe_k.instances.{{k}}.lookup_table_weight", f"params/{_REPEAT}/position/table", "position"),
    Rule(f"{_SOURCE}.attn.conv_l.instances.{{k}}.weight", f"params/{_REPEAT}/mix_logits/kernel", "pointwise"),
    Rule(f"{_SOURCE}.attn.conv_w.instances.{{k}}.weight", f"params/{_REPEAT}/mix_weights/kernel", "pointwise"),
    *matrices(_SOURCE, _BLOCK),
    *layer_norm("norm", "norm"),
    *dense("head", "head"),
    *dense("head_dist", "head_distill"),
)


def deit_rules(model: MiniDeit) -> tuple[Rule, ...]:
    """One table for all sizes and degrees of sharing; a rule without a path in the model is not used."""
    return _DEIT


def swin_rules(model: MiniSwin) -> tuple[Rule, ...]:
    """The table of a model, which depends on the number of its stages."""
    table = list(frame(model))
    for i in range(len(model.depths)):
        source, target = f"layers.{i}.blocks.{{i}}", f"stage{i + 1}/block{{i}}"
        repeat = f"{target}/repeat{{k}}"
        table += window_attention(source, target)
        table += layer_norm(f"{source}.norm1_list.{{k}}", f"{repeat}/attention_norm")
        table += layer_norm(f"{source}.norm2_list.{{k}}", f"{repeat}/ffn_norm")
        table += dense(f"{source}.proj_l.{{k}}", f"{repeat}/mix_logits")
        table += dense(f"{source}.proj_w.{{k}}", f"{repeat}/mix_weights")
        table += layer_norm(f"{source}.local_norm_list.{{k}}", f"{repeat}/local_norm")
        table += conv(f"{source}.local_conv_list.{{k}}", f"{repeat}/local_conv")
    return tuple(table)
