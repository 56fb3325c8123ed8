"""Variables of our detectors out of the states of mmdetection and torchvision, for the reference cases."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from halvit_jax.trees import unflatten

_RESNET = [
    (r"conv1", "stem/conv"),
    (r"bn1", "stem/norm"),
    (r"layer(\d)\.(\d)\.conv(\d)", r"stage\1/block\2/conv\3"),
    (r"layer(\d)\.(\d)\.bn(\d)", r"stage\1/block\2/norm\3"),
    (r"layer(\d)\.(\d)\.downsample\.0", r"stage\1/block\2/shortcut/conv"),
    (r"layer(\d)\.(\d)\.downsample\.1", r"stage\1/block\2/shortcut/norm"),
]
MMDET = [
    *((rf"backbone\.{theirs}", f"backbone/{ours}") for theirs, ours in _RESNET),
    (r"neck\.lateral_convs\.(\d)\.conv", r"pyramid/lateral<\1>"),
    (r"neck\.fpn_convs\.(\d)\.conv", r"pyramid/output<\1>"),
    (r"rpn_head\.rpn_conv", "rpn/conv"),
    (r"rpn_head\.rpn_cls", "rpn/score"),
    (r"rpn_head\.rpn_reg", "rpn/delta"),
    (r"roi_head\.bbox_head\.shared_fcs\.(\d)", r"box_head/fc(\1+1)"),
    (r"roi_head\.bbox_head\.fc_cls", "box_head/score"),
    (r"roi_head\.bbox_head\.fc_reg", "box_head/delta"),
    (r"roi_head\.mask_head\.convs\.(\d)\.conv", r"mask_head/conv(\1+1)"),
    (r"roi_head\.mask_head\.upsample", "mask_head/enlarge"),
    (r"roi_head\.mask_head\.conv_logits", "mask_head/mask"),
    (r"bbox_head\.cls_convs\.(\d)\.conv", r"head/score_conv(\1+1)"),
    (r"bbox_head\.reg_convs\.(\d)\.conv", r"head/delta_conv(\1+1)"),
    (r"bbox_head\.retina_cls", "head/score"),
    (r"bbox_head\.retina_reg", "head/delta"),
]
TORCHVISION = [
    *((rf"backbone\.body\.{theirs}", f"backbone/{ours}") for theirs, ours in _RESNET),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0", r"pyramid/lateral<\1>"),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0", r"pyramid/output<\1>"),
    (r"rpn\.head\.conv\.0\.0", "rpn/conv"),
    (r"rpn\.head\.cls_logits", "rpn/score"),
    (r"rpn\.head\.bbox_pred", "rpn/delta"),
    (r"roi_heads\.box_head\.fc6", "box_head/fc1"),
    (r"roi_heads\.box_head\.fc7", "box_head/fc2"),
    (r"roi_heads\.box_predictor\.cls_score", "box_head/score"),
    (r"roi_heads\.box_predictor\.bbox_pred", "box_head/delta"),
    (r"roi_heads\.mask_head\.(\d)\.0", r"mask_head/conv(\1+1)"),
    (r"roi_heads\.mask_predictor\.conv5_mask", "mask_head/enlarge"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits", "mask_head/mask"),
]
_STATISTICS = {"running_mean": "mean", "running_var": "var"}
_NORM = re.compile(r"norm\d?$")


def variables(state: Mapping[str, np.ndarray], table: list[tuple[str, str]], first: int) -> tuple[Any, dict[str, str]]:
    """Our variables, and {their name: our path below `params`}; `first` is the stride of the finest lateral."""
    arrays, paths = {}, {}
    background_first = table is TORCHVISION
    for name, array in state.items():
        module, kind = name.rsplit(".", 1)
        if kind == "num_batches_tracked":
            continue
        (place,) = [re.sub(theirs, ours, module) for theirs, ours in table if re.fullmatch(theirs, module)]
        place = re.sub(r"<(\d)>", lambda number: str(first * 2 ** int(number[1])), place)
        place = re.sub(r"\((\d)\+1\)", lambda number: str(int(number[1]) + 1), place)
        if background_first and place == "box_head/score":
            array = np.roll(array, -1, axis=0)
        if background_first and place == "box_head/delta":
            array = array[4:]
        if background_first and place == "mask_head/mask":
            array = array[1:]
        if kind in _STATISTICS:
            arrays[f"batch_stats/{place}/{_STATISTICS[kind]}"] = array
            continue
        if kind == "bias":
            path = f"{place}/bias"
        else:
            path = f"{place}/{'scale' if _NORM.search(place) else 'kernel'}"
            array = _kernel(array, place)
        arrays[f"params/{path}"], paths[name] = array, path
    return unflatten(arrays), paths


def _kernel(array: np.ndarray, place: str) -> np.ndarray:
    if place == "box_head/fc1":  # [o, c 7 7] -> [7 7 c, o]
        return array.reshape(len(array), -1, 7, 7).transpose(2, 3, 1, 0).reshape(-1, len(array))
    if place == "mask_head/enlarge":  # [i, o, 2, 2] -> [2, 2, i, o]
        return array.transpose(2, 3, 0, 1)
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
