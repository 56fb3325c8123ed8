"""Names of detectors: mmdetection's, which the authors of most backbones use too, and torchvision's Mask R-CNN.

Names of the backbone are those of its own table, below `backbone.` or `backbone.body.`. torchvision's class 0 is the
background, so its 91 classes of COCO are 90 here.
"""

import re
from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from halvit_jax.convert import engine, rules_of
from halvit_jax.convert.engine import Rule, conv, dense, layer_norm
from halvit_jax.trees import flatten

SIDE = 128  # pixels of the images that shapes are made with


def library_of(state: Mapping[str, Any]) -> str:
    """`torchvision` or `mmdet`, from the names of a detector's state; "" for any other state."""
    if any(name.startswith("backbone.body.") for name in state):
        return "torchvision"
    return "mmdet" if any(name.startswith("neck.") for name in state) else ""


def from_torch_arrays(
    name: str, detector: Any, state: Mapping[str, Any], wanted: engine.Shapes, *, free: Set[str] = frozenset()
) -> dict[str, np.ndarray]:
    """The arrays of a detector's PyTorch state under our paths; `name` is the backbone's, `wanted` the `shapes_of`.

    Raises:
        ValueError: what `engine.from_torch_arrays` refuses.
    """
    table = rules(name, detector, library_of(state), wanted)
    return engine.from_torch_arrays(f"a detector on {name}", table, state, wanted, free=free)


def shapes_of(detector: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a detector's variables. Nothing is computed."""
    given = jnp.zeros((1, SIDE, SIDE, 3)), jnp.full((1, 2), SIDE)
    shapes = jax.eval_shape(lambda: detector.init(jax.random.key(0), *given))
    return {path: leaf.shape for path, leaf in flatten(shapes).items()}


def rules(name: str, detector: Any, library: str, wanted: engine.Shapes) -> tuple[Rule, ...]:
    """The table of a detector on the backbone `name`: a library's names on the left."""
    prefix = {"mmdet": "backbone", "torchvision": "backbone.body"}[library]
    backbone = [
        Rule(f"{prefix}.{rule.source}", "/backbone/".join(rule.target.split("/", 1)), rule.layout)
        for rule in rules_of(name, detector.backbone)
    ]
    table = {"mmdet": _mmdet, "torchvision": _torchvision}[library](wanted)
    return (*backbone, *table)


def _mmdet(wanted: engine.Shapes) -> list[Rule]:
    laterals, outputs, enlarged, norms = (_strides(wanted, kind) for kind in ("lateral", "output", "enlarge", "norm"))
    table = [*_both("roi_head.mask_head.upsample", "mask_head/enlarge", "transposed")]
    for i, stride in enumerate(laterals):
        table += conv(f"neck.lateral_convs.{i}.conv", f"pyramid/lateral{stride}")
    for i, stride in enumerate(outputs[len(enlarged) :]):
        table += conv(f"neck.fpn_convs.{i}.conv", f"pyramid/output{stride}")
    for i, stride in enumerate(outputs[: len(enlarged)]):  # SHViT's
        table += conv(f"neck.extra_fpn_convs.{i}.conv", f"pyramid/output{stride}")
    for i, stride in enumerate(reversed(enlarged)):
        table += _both(f"neck.extra_trans_convs.{i}", f"pyramid/enlarge{stride}", "transposed")
    for i, stride in enumerate(norms):  # Swin's
        table += layer_norm(f"backbone.norm{i}", f"norms/norm{stride}")
    for theirs, ours in (("conv", "conv"), ("cls", "score"), ("reg", "delta")):
        table += conv(f"rpn_head.rpn_{theirs}", f"rpn/{ours}")
    table += _both("roi_head.bbox_head.shared_fcs.0", "box_head/fc1", "pooled")
    table += dense("roi_head.bbox_head.shared_fcs.1", "box_head/fc2")
    table += [
        *dense("roi_head.bbox_head.fc_cls", "box_head/score"),
        *dense("roi_head.bbox_head.fc_reg", "box_head/delta"),
    ]
    table += conv("roi_head.mask_head.conv_logits", "mask_head/mask")
    for i in _numbers(wanted, r"mask_head/conv(\d+)/"):
        table += conv(f"roi_head.mask_head.convs.{i - 1}.conv", f"mask_head/conv{i}")
    for theirs, ours in (("cls", "score"), ("reg", "delta")):
        table += conv(f"bbox_head.retina_{theirs}", f"head/{ours}")
        for i in _numbers(wanted, rf"/head/{ours}_conv(\d+)/"):
            table += conv(f"bbox_head.{theirs}_convs.{i - 1}.conv", f"head/{ours}_conv{i}")
    return table


def _torchvision(wanted: engine.Shapes) -> list[Rule]:
    table = [*conv("rpn.head.conv.0.0", "rpn/conv"), *conv("rpn.head.cls_logits", "rpn/score")]
    table += conv("rpn.head.bbox_pred", "rpn/delta")
    for kind, theirs in (("lateral", "inner_blocks"), ("output", "layer_blocks")):
        for i, stride in enumerate(_strides(wanted, kind)):
            table += conv(f"backbone.fpn.{theirs}.{i}.0", f"pyramid/{kind}{stride}")
    table += _both("roi_heads.box_head.fc6", "box_head/fc1", "pooled")
    table += dense("roi_heads.box_head.fc7", "box_head/fc2")
    table += _both("roi_heads.box_predictor.cls_score", "box_head/score", "background_first", "background_first_bias")
    table += _both("roi_heads.box_predictor.bbox_pred", "box_head/delta", "background_boxes", "background_boxes_bias")
    for i in _numbers(wanted, r"mask_head/conv(\d+)/"):
        table += conv(f"roi_heads.mask_head.{i - 1}.0", f"mask_head/conv{i}")
    table += _both("roi_heads.mask_predictor.conv5_mask", "mask_head/enlarge", "transposed")
    masks = "background_masks", "background_masks_bias"
    return [*table, *_both("roi_heads.mask_predictor.mask_fcn_logits", "mask_head/mask", *masks)]


def _both(source: str, target: str, kernel: str, bias: str = "same") -> list[Rule]:
    """The kernel and the bias of a layer, each in its layout."""
    return [
        Rule(f"{source}.weight", f"params/{target}/kernel", kernel),
        Rule(f"{source}.bias", f"params/{target}/bias", bias),
    ]


def _strides(wanted: engine.Shapes, kind: str) -> list[int]:
    """The strides of which the pyramid, or the norms before it, have a layer of this kind."""
    return _numbers(wanted, rf"^params/(?:pyramid|norms)/{kind}(\d+)/")


def _numbers(wanted: engine.Shapes, pattern: str) -> list[int]:
    return sorted({int(found[1]) for path in wanted if (found := re.search(pattern, path))})
