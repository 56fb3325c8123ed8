"""Detection in static shapes: Mask R-CNN and RetinaNet, and each of their parts as a function of its own.

Functions are written for one image and mapped over a batch by `jax.vmap`; padding rows carry a flag, never a special
value. Numbers are mmdetection's, or torchvision's by `conventions="torchvision"`.
"""

from halvit_jax.detection.anchors import Anchors, inside_flags, retinanet_anchors
from halvit_jax.detection.assign import Matching, assign
from halvit_jax.detection.boxes import area, clip, decode, encode, iof, iou, rescale
from halvit_jax.detection.conventions import CONVENTIONS, MMDET, TORCHVISION, Conventions
from halvit_jax.detection.create import DETECTORS, create_detector
from halvit_jax.detection.detector import Detector, Losses
from halvit_jax.detection.losses import focal, sigmoid_cross_entropy, smooth_l1, softmax_cross_entropy
from halvit_jax.detection.mask_rcnn import MaskRCNN
from halvit_jax.detection.nms import class_nms, nms
from halvit_jax.detection.paste import paste, paste_torchvision
from halvit_jax.detection.proposals import propose
from halvit_jax.detection.retinanet import RetinaNet
from halvit_jax.detection.roi_align import axis_weights, roi_align, roi_level
from halvit_jax.detection.sample import sample
from halvit_jax.detection.targets import box_targets, mask_targets

__all__ = [
    "CONVENTIONS",
    "DETECTORS",
    "MMDET",
    "TORCHVISION",
    "Anchors",
    "Conventions",
    "Detector",
    "Losses",
    "MaskRCNN",
    "Matching",
    "RetinaNet",
    "area",
    "assign",
    "axis_weights",
    "box_targets",
    "class_nms",
    "clip",
    "create_detector",
    "decode",
    "encode",
    "focal",
    "inside_flags",
    "iof",
    "iou",
    "mask_targets",
    "nms",
    "paste",
    "paste_torchvision",
    "propose",
    "rescale",
    "retinanet_anchors",
    "roi_align",
    "roi_level",
    "sample",
    "sigmoid_cross_entropy",
    "smooth_l1",
    "softmax_cross_entropy",
]
