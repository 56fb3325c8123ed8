"""Names of Next-ViT: the official release's, which number the blocks through all stages.

Hallucinated maps and compact feed-forward layers have no published PyTorch form. Our names are
`e_mhsa.hallucination.across` and `.within`, and instead of `mlp.conv2` two factors `first` and `second`, each a list of
convolutions with their norms: `mlp.conv2.first.0.conv`, `mlp.conv2.first.0.norm`.
"""

from halvit_jax.convert.engine import Rule, batch_norm, conv, dense
from halvit_jax.models.nextvit import NextViT


def rules(model: NextViT) -> tuple[Rule, ...]:
    """The table of a model, which depends on the kinds of its blocks."""
    table = [*batch_norm("norm", "norm"), *dense("proj_head.0", "head")]
    for i in range(len(model.stem_widths)):
        table += _conv_norm(f"stem.{i}", f"stem/conv{i}")
    number = 0
    for stage in range(len(model.depths)):
        for i, is_transformer in enumerate(model.is_transformer_block(stage)):
            block = _transformer_block if is_transformer else _conv_block
            table += block(f"features.{number}", f"stage{stage + 1}/block{i}", model.ffn_branches)
            number += 1
    return tuple(table)


def _conv_block(source: str, target: str, branches: int) -> list[Rule]:
    return [*_both(source, target, branches), *batch_norm(f"{source}.norm", f"{target}/ffn_norm")]


def _transformer_block(source: str, target: str, branches: int) -> list[Rule]:
    attention, ours = f"{source}.e_mhsa", f"{target}/attention"
    made, ours_made = f"{attention}.hallucination", f"params/{ours}/maps/hallucination"
    return [
        *_both(source, target, branches),
        *batch_norm(f"{source}.norm1", f"{target}/attention_norm"),
        *dense(f"{attention}.q", f"{ours}/query"),
        *dense(f"{attention}.k", f"{ours}/key"),
        *dense(f"{attention}.v", f"{ours}/value"),
        *dense(f"{attention}.proj", f"{ours}/output"),
        *batch_norm(f"{attention}.norm", f"{ours}/pooled_norm"),
        Rule(f"{made}.across.weight", f"{ours_made}/across", "pointwise"),
        Rule(f"{made}.within.weight", f"{ours_made}/within", "conv"),
        *_conv_norm(f"{source}.projection", f"{target}/narrow"),
        *batch_norm(f"{source}.norm2", f"{target}/ffn_norm"),
    ]


def _both(source: str, target: str, branches: int) -> list[Rule]:
    """The rules for both kinds of block."""
    table = [
        *_conv_norm(f"{source}.patch_embed", f"{target}/embed"),
        *conv(f"{source}.mhca.group_conv3x3", f"{target}/local/heads/conv"),
        *batch_norm(f"{source}.mhca.norm", f"{target}/local/heads/norm"),
        *conv(f"{source}.mhca.projection", f"{target}/local/output"),
        *_pointwise(f"{source}.mlp.conv1", f"{target}/ffn/expand"),
        *_pointwise(f"{source}.mlp.conv2", f"{target}/ffn/reduce"),
    ]
    for factor in ("first", "second"):
        for i in range(branches):
            branch, ours = f"{source}.mlp.conv2.{factor}.{i}", f"{target}/ffn/reduce/{factor}{i}"
            table += [*_pointwise(f"{branch}.conv", f"{ours}/dense"), *batch_norm(f"{branch}.norm", f"{ours}/norm")]
    return table


def _conv_norm(source: str, target: str) -> list[Rule]:
    return [*conv(f"{source}.conv", f"{target}/conv"), *batch_norm(f"{source}.norm", f"{target}/norm")]


def _pointwise(source: str, target: str) -> tuple[Rule, ...]:
    """A 1x1 convolution that is a matrix here."""
    kernel = Rule(f"{source}.weight", f"params/{target}/kernel", "pointwise")
    return kernel, Rule(f"{source}.bias", f"params/{target}/bias")
