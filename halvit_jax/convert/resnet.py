"""Names of ResNets: torchvision's (timm has the same), and the authors' for HaLViT-ResNet and -ResNeXt.

The authors' ResNet has no classifier, so its files need `num_classes=0`; an added one is named `fc`, as in their
ResNeXt.
"""

from halvit_jax.convert.engine import Rule, batch_norm, conv, dense
from halvit_jax.models.resnet import ResNet


def rules(model: ResNet) -> tuple[Rule, ...]:
    """The table of a model, which depends on the kinds of its stages."""
    stem = ("stem.0", "stem.1") if any(kind in _TIED_STAGES for kind in model.stages) else ("conv1", "bn1")
    table = [*conv(stem[0], "stem/conv"), *batch_norm(stem[1], "stem/norm"), *dense("fc", "head")]
    for i, kind in enumerate(model.stages):
        table += (_TIED_STAGES.get(kind) or _plain)(f"layer{i + 1}", f"stage{i + 1}")
    return tuple(table)


def _plain(source: str, target: str) -> list[Rule]:
    table = []
    for k in (1, 2, 3):
        table += conv(f"{source}.{{i}}.conv{k}", f"{target}/block{{i}}/conv{k}")
        table += batch_norm(f"{source}.{{i}}.bn{k}", f"{target}/block{{i}}/norm{k}")
    return table + _conv_norm(f"{source}.{{i}}.downsample", f"{target}/block{{i}}/shortcut")


def _halvit(source: str, target: str) -> list[Rule]:
    """ResNet50: a block is [norm, relu, conv, norm, relu]; its last norm is in a separate list."""
    return [
        Rule(f"{source}.convp", f"params/{target}/tied/kernel", "pointwise"),
        *_conv_norm(f"{source}.main_path_upsampler", f"{target}/widen"),
        *_conv_norm(f"{source}.downsample_path", f"{target}/shortcut"),
        *batch_norm(f"{source}.downsample_path.2", f"{target}/shortcut_norm"),
        *batch_norm(f"{source}.processing_blocks.{{i}}.0", f"{target}/block{{i}}/norm1"),
        *conv(f"{source}.processing_blocks.{{i}}.2", f"{target}/block{{i}}/conv2"),
        *batch_norm(f"{source}.processing_blocks.{{i}}.3", f"{target}/block{{i}}/norm2"),
        *batch_norm(f"{source}.final_bns.{{i}}", f"{target}/block{{i}}/norm3"),
    ]


def _halvit_prenorm(source: str, target: str) -> list[Rule]:
    """ResNeXt101: a list for each layer of the blocks."""
    return [
        Rule(f"{source}.convp", f"params/{target}/tied/kernel", "pointwise"),
        *conv(f"{source}.channel_adapter", f"{target}/widen"),
        *_conv_norm(f"{source}.downsample", f"{target}/shortcut"),
        *batch_norm(f"{source}.bn_pre_list.{{i}}", f"{target}/block{{i}}/norm1"),
        *conv(f"{source}.conv2_list.{{i}}", f"{target}/block{{i}}/conv2"),
        *batch_norm(f"{source}.bn2_list.{{i}}", f"{target}/block{{i}}/norm2"),
        *batch_norm(f"{source}.bn_post_list.{{i}}", f"{target}/block{{i}}/norm3"),
    ]


_TIED_STAGES = {"halvit": _halvit, "halvit_prenorm": _halvit_prenorm}


def _conv_norm(source: str, target: str) -> list[Rule]:
    return [*conv(f"{source}.0", f"{target}/conv"), *batch_norm(f"{source}.1", f"{target}/norm")]
