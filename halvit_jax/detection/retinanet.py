"""RetinaNet (Lin et al. 2017, arXiv 1708.02002), in static shapes.

One stage: every anchor of a pyramid of the strides 8 to 128 is classified and refined, and the focal loss keeps the
many easy ones from outweighing the rest. Defaults are mmdetection 3.3's `retinanet_r50_fpn`.

Shapes: `b` batch, `a` anchors, `g` ground-truth rows, `k` classes, `d` detections.
"""

import jax
import jax.numpy as jnp
from jax import lax

from halvit_jax.detection.anchors import retinanet_anchors
from halvit_jax.detection.assign import NEITHER, Matching, assign
from halvit_jax.detection.boxes import RPN_STD, clip, decode, iou
from halvit_jax.detection.detector import Detector, Losses, Truth, counted, grids, shapes
from halvit_jax.detection.heads import RetinaNetHead
from halvit_jax.detection.losses import focal, smooth_l1
from halvit_jax.detection.nms import class_nms
from halvit_jax.detection.targets import box_targets

POSITIVE, NEGATIVE = 0.5, 0.4  # IoU of an anchor with its box


class RetinaNet(Detector):
    """A class and a box for each of nine anchors at every position.

    `__call__(images, size)` detects: images [b, h, w, 3], normalised, and int32 [b, 2] -> a dict of `boxes` [b, d, 4]
    in pixels of the canvas, `scores`, `labels`, `valid` [b, d] and `truncated` [b], d = detections. `losses` is
    training.
    """

    head_depth: int = 4  # convolutions before each output
    test_candidates: int = 1000  # (anchor, class) pairs of each level, before suppression
    box_nms: float = 0.5  # IoU above which detections of a class suppress each other
    score_threshold: float = 0.05
    detections: int = 100  # d
    candidates: int = 2048  # of all levels, that suppression looks at

    extra = "conv"

    def setup(self) -> None:
        super().setup()
        self.anchors = retinanet_anchors(rounded=self.choices.round_anchors)
        self.head = RetinaNetHead(self.num_classes, self.width, self.head_depth, self.anchors.count, dtype=self.dtype)

    def __call__(self, images: jax.Array, size: jax.Array) -> dict[str, jax.Array]:
        maps = self.features(images, size, train=False)
        logits, deltas = zip(*(self.head(level) for level in maps.values()), strict=True)
        anchors = grids(self.anchors, maps, images.shape[1:3], whole_steps=self.choices.whole_steps)

        def one(logits: list[jax.Array], deltas: list[jax.Array], size: jax.Array) -> dict[str, jax.Array]:
            levels = [self._candidates(*level, size) for level in zip(logits, deltas, anchors, strict=True)]
            boxes, scores, labels = (jnp.concatenate(arrays) for arrays in zip(*levels, strict=True))
            # Anchors over the padding are scored too, and end at the image's border without any area.
            sides = boxes[:, 2:] - boxes[:, :2]
            least = self.choices.detection_min_side or 0.0
            valid = (scores > self.score_threshold) & jnp.all((sides > 0) & (sides >= least), -1)
            limits = {"limit": self.detections, "candidates": self.candidates}
            return class_nms(boxes, scores, labels, valid, threshold=self.box_nms, **limits)._asdict()

        return jax.vmap(one)(list(logits), list(deltas), size)

    def losses(self, images: jax.Array, truth: Truth, key: jax.Array | None = None, *, train: bool = True) -> Losses:
        """The two losses of a batch and its metrics; `truth` as in `detection.detector`. Nothing is drawn by `key`."""
        del key
        maps = self.features(images, truth["size"], train=train)
        logits, deltas = zip(*(self.head(level) for level in maps.values()), strict=True)
        anchors = grids(self.anchors, maps, images.shape[1:3], whole_steps=self.choices.whole_steps)
        every, choices, level_shapes = jnp.concatenate(anchors), self.choices, shapes(maps)
        matching = Matching(POSITIVE, NEGATIVE, 0.0, True, choices.low_quality_to_last)

        def one(
            logits: jax.Array,
            deltas: jax.Array,
            boxes: jax.Array,
            label: jax.Array,
            real: jax.Array,
            size: jax.Array,
            counts: jax.Array,
        ) -> jax.Array:
            usable = self.usable(size, level_shapes, self.anchors.count) & counts
            code = assign(iou(boxes, every), real, matching, usable)
            targets, positive = box_targets(every, boxes, code, RPN_STD)
            labels = jnp.where(positive, label[jnp.maximum(code, 0)] if len(label) else 0, self.num_classes)
            scores = focal(logits, labels, (code != NEITHER).astype(jnp.float32))
            box = smooth_l1(deltas, targets, positive.astype(jnp.float32), beta=choices.smooth_l1_beta)
            positives, places = (flags.sum(dtype=jnp.float32) for flags in (positive, usable))
            divisor = jnp.maximum(positives, 1) * counts.astype(jnp.float32)
            return jnp.stack([scores, box, positives, divisor, places])

        rows = jnp.concatenate(logits, 1), jnp.concatenate(deltas, 1)
        given = (truth[name] for name in ("boxes", "label", "real", "size"))
        sums = jax.vmap(one)(*rows, *given, counted(truth)).sum(0)
        divisor = jnp.maximum(sums[3], 1)
        positives = sums[2] / jnp.maximum(sums[4], 1)
        return Losses({"class": sums[0] / divisor, "box": sums[1] / divisor}, {"positives": positives})

    def _candidates(
        self, logits: jax.Array, deltas: jax.Array, anchors: jax.Array, size: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Boxes, scores and labels of the best (anchor, class) pairs of a level: logits [a, k], deltas [a, 4]."""
        pairs = logits.reshape(-1)  # [a, k] -> [a k]
        best, index = lax.top_k(jnp.where(jnp.isnan(pairs), -jnp.inf, pairs), min(self.test_candidates, pairs.size))
        anchor = index // self.num_classes
        clamp = self.choices.clamp_shrinking
        boxes = decode(jnp.asarray(anchors)[anchor], deltas[anchor], RPN_STD, clamp_shrinking=clamp)
        return clip(boxes, size), jax.nn.sigmoid(best), index % self.num_classes
