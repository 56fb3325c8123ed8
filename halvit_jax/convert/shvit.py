"""Names of SHViT: the official release's, and timm's for reading, which number the parts of a stage differently.

In the release, the parts of a merging of patches are the first three entries of their stage's list; in timm they are
five entries of a separate list.
"""

from halvit_jax.convert.engine import Rule, batch_norm, conv, dense, layer_norm
from halvit_jax.models.shvit import SHViT


def rules(model: SHViT) -> tuple[Rule, ...]:
    """The table of a model, which depends on the numbers of its convolutions, stages and blocks."""
    table = []
    for source, target in (("head", "head"), ("head_dist", "head_distill")):
        table += [*batch_norm(f"{source}.bn", f"{target}/norm"), *dense(f"{source}.l", f"{target}/linear")]
    for i in range(len(model.stem_strides)):
        table += _conv_norm(f"patch_embed.{2 * i}", f"stem/conv{i}")  # ReLUs have the odd indices
    for names in (_official, _timm):  # the first names are the ones written
        for stage, depth in enumerate(model.depths, 1):
            table += names(stage, depth)
    return tuple(table)


def _official(stage: int, depth: int) -> list[Rule]:
    source, target, first = f"blocks{stage}", f"stage{stage}", 0
    table = []
    if stage > 1:
        table += _local_and_ffn(f"{source}.0.0", f"{source}.0.1", f"{target}/before")
        table += _merge(f"{source}.1", f"{target}/merge")
        table += _local_and_ffn(f"{source}.2.0", f"{source}.2.1", f"{target}/after")
        first = 3
    for i in range(depth):
        table += _block(f"{source}.{first + i}", f"{target}/block{i}")
    return table


def _timm(stage: int, depth: int) -> list[Rule]:
    source, target = f"stages.{stage - 1}", f"stage{stage}"
    table = []
    if stage > 1:
        table += _local_and_ffn(f"{source}.downsample.0", f"{source}.downsample.1", f"{target}/before")
        table += _merge(f"{source}.downsample.2", f"{target}/merge")
        table += _local_and_ffn(f"{source}.downsample.3", f"{source}.downsample.4", f"{target}/after")
    for i in range(depth):
        table += _block(f"{source}.blocks.{i}", f"{target}/block{i}")
    return table


def _block(source: str, target: str) -> list[Rule]:
    return [
        *_local_and_ffn(f"{source}.conv", f"{source}.ffn", target),
        *layer_norm(f"{source}.mixer.m.pre_norm", f"{target}/attention/norm"),
        *_conv_norm(f"{source}.mixer.m.qkv", f"{target}/attention/qkv"),
        *_conv_norm(f"{source}.mixer.m.proj.1", f"{target}/attention/output"),
    ]


def _local_and_ffn(local: str, ffn: str, target: str) -> list[Rule]:
    return [
        *_conv_norm(f"{local}.m", f"{target}/local"),
        *_conv_norm(f"{ffn}.m.pw1", f"{target}/ffn/expand"),
        *_conv_norm(f"{ffn}.m.pw2", f"{target}/ffn/reduce"),
    ]


def _merge(source: str, target: str) -> list[Rule]:
    return [
        *_conv_norm(f"{source}.conv1", f"{target}/expand"),
        *_conv_norm(f"{source}.conv2", f"{target}/stride"),
        *conv(f"{source}.se.fc1", f"{target}/excite/reduce"),
        *conv(f"{source}.se.fc2", f"{target}/excite/expand"),
        *_conv_norm(f"{source}.conv3", f"{target}/reduce"),
    ]


def _conv_norm(source: str, target: str) -> list[Rule]:
    kernel = Rule(f"{source}.c.weight", f"params/{target}/conv/kernel", "conv")
    return [kernel, *batch_norm(f"{source}.bn", f"{target}/norm")]
