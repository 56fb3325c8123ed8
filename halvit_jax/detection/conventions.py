"""The choices on which detection libraries differ, as data.

Names of fields say what is chosen; `MMDET` is what the published numbers of our backbones were measured with
(mmdetection 3.3, `configs/_base_/models/mask-rcnn_r50_fpn.py`), `TORCHVISION` is `torchvision.models.detection`.
"""

import dataclasses

UNION_FLOOR = 1e-6  # of an IoU's denominator: two boxes of no area have IoU 0 instead of 0 / 0
TIE = 1e-6  # IoUs this close to the best one count as equal to it, whatever order a compiler adds in


@dataclasses.dataclass(frozen=True)
class Conventions:
    """Choices in matching, encoding, pooling and scoring boxes; the defaults are mmdetection's."""

    round_anchors: bool = False  # corners of the anchors at position 0 rounded to whole pixels
    whole_steps: bool = False  # positions of a map are canvas // map pixels apart instead of the stride
    anchors_of_canvas: bool = False  # anchors over the padding take part in training too
    low_quality_to_last: bool = True  # an anchor tied as the best of several boxes goes to the last; else its own best
    rpn_least_iou: float = 0.3  # with which a box may claim its best anchors although it is below the threshold
    roi_low_quality: bool = True  # proposals may be claimed likewise, at the threshold itself
    clamp_shrinking: bool = True  # bound log sizes on both sides when decoding; else only growth
    smooth_l1_beta: float = 0.0  # of both box losses; 0 is the plain L1
    proposal_min_side: float = 0.0  # in pixels; a proposal needs sides above 0 and at least this
    detection_min_side: float | None = None  # None: detections of no area stay
    roi_aligned: bool = True  # RoIAlign shifted by half a pixel
    roi_samples: int = 0  # a bin and axis; 0: as many as the bin has pixels
    roi_level_inside: bool = True  # 1e-6 is added inside the logarithm; else to it
    soft_mask_targets: bool = False  # coverage sampled without the half-pixel shift; else that shift, and >= 0.5


MMDET = Conventions()
TORCHVISION = Conventions(
    round_anchors=True,
    whole_steps=True,
    anchors_of_canvas=True,
    low_quality_to_last=False,
    rpn_least_iou=0.0,
    roi_low_quality=False,
    clamp_shrinking=False,
    smooth_l1_beta=1 / 9,
    proposal_min_side=1e-3,
    detection_min_side=1e-2,
    roi_aligned=False,
    roi_samples=2,
    roi_level_inside=False,
    soft_mask_targets=True,
)
CONVENTIONS = {"mmdet": MMDET, "torchvision": TORCHVISION}
