"""Mask R-CNN on a feature pyramid (He et al. 2017, arXiv 1703.06870), in static shapes.

The first stage scores anchors and proposes boxes, the second classifies, refines and draws them. Everything is written
for one image and mapped over the batch; losses are summed over the global batch before they are divided, so that they
do not depend on the number of devices. Defaults are mmdetection 3.3's `mask-rcnn_r50_fpn`.

Shapes: `b` batch, `a` anchors, `g` ground-truth rows, `m` proposals, `n` samples, `k` classes, `c` channels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.detection.anchors import Anchors
from halvit_jax.detection.assign import NEITHER, Matching, assign
from halvit_jax.detection.boxes import ROI_STD, RPN_STD, clip, decode, iou
from halvit_jax.detection.detector import Detector, Losses, Truth, counted, grids, image_keys, shapes
from halvit_jax.detection.heads import BoxHead, MaskHead, RPNHead
from halvit_jax.detection.losses import sigmoid_cross_entropy, smooth_l1, softmax_cross_entropy
from halvit_jax.detection.nms import Detections, class_nms
from halvit_jax.detection.proposals import Proposals, propose
from halvit_jax.detection.pyramid import Maps
from halvit_jax.detection.roi_align import roi_align
from halvit_jax.detection.sample import sample
from halvit_jax.detection.targets import box_targets, mask_targets
from halvit_jax.layers.arrays import align_last

BOX_BINS, MASK_BINS = 7, 14
DRAWN = (0.25, 0.5, 1.0)  # shares of the slots of masks, of which the smallest that is enough is drawn
LEAST_CUT = 32  # slots from which on that is worth a conditional
POOLED_LEVELS = 4  # boxes are pooled from all levels but the coarsest


class MaskRCNN(Detector):
    """Two stages on a pyramid of five levels.

    `__call__(images, size)` detects: images [b, h, w, 3], normalised, and int32 [b, 2] -> a dict of `boxes` [b, d, 4]
    in pixels of the canvas, `scores`, `labels`, `valid` [b, d], `masks` [b, d, 28, 28] (probabilities) and `truncated`
    [b], d = detections. `losses` is training.
    """

    hidden: int = 1024  # width of the box head
    mask_depth: int = 4  # convolutions of the mask head
    masks: bool = True  # without them it is Faster R-CNN
    anchor_scale: float = 8.0  # side of the square anchor / stride
    train_candidates: int = 2000  # of each level, before suppression
    train_proposals: int = 1000
    test_candidates: int = 1000
    test_proposals: int = 1000
    rpn_samples: int = 256
    rpn_positives: float = 0.5  # at most, of the samples
    roi_samples: int = 512
    roi_positives: float = 0.25
    rpn_nms: float = 0.7  # IoU above which proposals suppress each other
    box_nms: float = 0.5  # and detections of a class
    score_threshold: float = 0.05
    detections: int = 100  # d
    candidates: int = 2048  # (proposal, class) pairs that suppression looks at

    def setup(self) -> None:
        super().setup()
        self.anchors = Anchors((self.anchor_scale,), rounded=self.choices.round_anchors)
        self.rpn = RPNHead(self.width, self.anchors.count, self.dtype)
        self.box_head = BoxHead(self.num_classes, self.hidden, self.dtype)
        if self.masks:
            self.mask_head = MaskHead(self.num_classes, self.width, self.mask_depth, self.dtype)

    def __call__(self, images: jax.Array, size: jax.Array) -> dict[str, jax.Array]:
        maps = self.features(images, size, train=False)
        proposals = self.proposals(maps, size, images.shape[1:3], self.test_candidates, self.test_proposals)
        logits, deltas = self._second_stage(maps, proposals.boxes)
        found = jax.vmap(self._select)(logits, deltas, proposals, size)
        answer = found._asdict()
        if self.masks:
            own = jax.nn.sigmoid(self._draw(maps, found.boxes, found.labels, found.valid))  # [b, d, 28, 28]
            answer["masks"] = own * found.valid[..., None, None].astype(jnp.float32)
        return answer

    def losses(self, images: jax.Array, truth: Truth, key: jax.Array | None, *, train: bool = True) -> Losses:
        """The five losses of a batch and its metrics; `truth` as in `detection.detector`.

        `key` draws the samples; None takes the first ones. `train` is passed to the backbone.
        """
        maps = self.features(images, truth["size"], train=train)
        canvas, b = images.shape[1:3], images.shape[0]
        logits, deltas = self._first_stage(maps)
        keys = image_keys(key, b)
        rpn_keys, roi_keys = (None, None) if keys is None else jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        anchors = self._grids(maps, canvas)
        losses, metrics = self._rpn_losses(logits, deltas, anchors, shapes(maps), truth, rpn_keys)
        numbers = self.train_candidates, self.train_proposals
        proposals = self._propose(logits, deltas, anchors, truth["size"], *numbers)
        boxes, code, weight, recall = _mapped(
            self._match, proposals, truth["boxes"], truth["real"], counted(truth), roi_keys
        )
        truth_of = jnp.maximum(code, 0)  # [b, n], a ground-truth row
        positive = (code >= 0).astype(jnp.float32)
        logits, deltas = self._second_stage(maps, boxes)
        labels = jnp.where(code >= 0, _take(truth["label"], truth_of), self.num_classes)
        targets, _ = jax.vmap(functools.partial(box_targets, std=ROI_STD))(boxes, truth["boxes"], code)
        own = _own(jnp.moveaxis(deltas, -2, -1), jnp.minimum(labels, self.num_classes - 1)[..., None])
        count = jnp.maximum(weight.sum(), 1)
        losses["class"] = softmax_cross_entropy(logits, labels, weight) / count
        losses["box"] = smooth_l1(own, targets, positive, beta=self.choices.smooth_l1_beta) / count
        metrics["roi_positives"] = positive.sum() / count
        metrics["proposal_recall"] = recall.sum() / jnp.maximum(truth["real"].sum(), 1)
        if self.masks:
            # Positives come first, so the slots behind the most there can be are never drawn.
            most = int(self.roi_samples * self.roi_positives)
            boxes, truth_of, labels, positive = (a[:, :most] for a in (boxes, truth_of, labels, positive))
            own = self._draw(maps, boxes, jnp.minimum(labels, self.num_classes - 1), positive > 0)
            targets = self._mask_targets(truth, boxes, truth_of, canvas, own.shape[-1])
            loss = sigmoid_cross_entropy(own, targets, positive[..., None, None])
            losses["mask"] = loss / (jnp.maximum(positive.sum(), 1) * own.shape[-1] ** 2)
        return Losses(losses, metrics)

    def proposals(self, maps: Maps, size: jax.Array, canvas: tuple[int, int], before: int, count: int) -> Proposals:
        """The first stage alone: the `count` best boxes of every image, from `before` anchors a level."""
        return self._propose(*self._first_stage(maps), self._grids(maps, canvas), size, before, count)

    def _grids(self, maps: Maps, canvas: tuple[int, int]) -> list[Any]:
        return grids(self.anchors, maps, canvas, whole_steps=self.choices.whole_steps)

    def _first_stage(self, maps: Maps) -> tuple[list[jax.Array], list[jax.Array]]:
        """Logits [b, a] and deltas [b, a, 4] of every level."""
        logits, deltas = zip(*(self.rpn(level) for _, level in sorted(maps.items())), strict=True)
        return list(logits), list(deltas)

    def _propose(
        self,
        logits: list[jax.Array],
        deltas: list[jax.Array],
        anchors: list[Any],
        size: jax.Array,
        before: int,
        count: int,
    ) -> Proposals:
        def one(logits: list[jax.Array], deltas: list[jax.Array], size: jax.Array) -> Proposals:
            return propose(
                logits,
                deltas,
                anchors,
                size,
                before=before,
                count=count,
                threshold=self.rpn_nms,
                min_side=self.choices.proposal_min_side,
                clamp_shrinking=self.choices.clamp_shrinking,
            )

        return jax.vmap(one)(logits, deltas, size)

    def _rpn_losses(
        self,
        logits: list[jax.Array],
        deltas: list[jax.Array],
        anchors: list[Any],
        level_shapes: dict[int, tuple[int, int]],
        truth: Truth,
        keys: jax.Array | None,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        choices = self.choices
        matching = Matching(0.7, 0.3, choices.rpn_least_iou, True, choices.low_quality_to_last)
        every = jnp.concatenate([jnp.asarray(level) for level in anchors])

        def one(
            logits: jax.Array,
            deltas: jax.Array,
            boxes: jax.Array,
            real: jax.Array,
            size: jax.Array,
            counts: jax.Array,
            key: jax.Array | None,
        ) -> jax.Array:
            usable = self.usable(size, level_shapes, self.anchors.count) & counts
            code = assign(iou(boxes, every), real, matching, usable)
            drawn = sample(code, key, n=self.rpn_samples, fraction=self.rpn_positives)
            code = jnp.where(drawn.positive, code[drawn.index], NEITHER)
            targets, _ = box_targets(every[drawn.index], boxes, code, RPN_STD)
            used = (drawn.positive | drawn.negative).astype(jnp.float32)
            positive = drawn.positive.astype(jnp.float32)
            score = sigmoid_cross_entropy(logits[drawn.index], positive, used)
            box = smooth_l1(deltas[drawn.index], targets, positive, beta=choices.smooth_l1_beta)
            positives, negatives = positive.sum(), drawn.negative.sum(dtype=jnp.float32)
            divisor = (jnp.maximum(positives, 1) + jnp.maximum(negatives, 1)) * counts.astype(jnp.float32)
            return jnp.stack([score, box, positives, divisor])

        rows = jnp.concatenate(logits, 1), jnp.concatenate(deltas, 1)
        sums = _mapped(one, *rows, truth["boxes"], truth["real"], truth["size"], counted(truth), keys).sum(0)
        divisor = jnp.maximum(sums[3], 1)
        return {"rpn_class": sums[0] / divisor, "rpn_box": sums[1] / divisor}, {"rpn_positives": sums[2] / divisor}

    def _match(
        self, proposals: Proposals, boxes: jax.Array, real: jax.Array, counts: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The samples of one image: boxes [n, 4], the ground-truth row each stands for or a negative number [n], which
        count [n], and which ground truth is covered by a proposal [g].
        """
        choices = self.choices
        matching = Matching(0.5, 0.5, 0.5, choices.roi_low_quality, choices.low_quality_to_last)
        overlaps = iou(boxes, proposals.boxes)
        code = assign(overlaps, real, matching, proposals.valid)
        # Ground truth is put before the proposals, each box standing for itself.
        code = jnp.concatenate([jnp.where(real, jnp.arange(len(boxes)), NEITHER), code])
        everything = jnp.concatenate([boxes, proposals.boxes])
        drawn = sample(jnp.where(counts, code, NEITHER), key, n=self.roi_samples, fraction=self.roi_positives)
        weight = (drawn.positive | drawn.negative).astype(jnp.float32)
        covered = real & (jnp.max(jnp.where(proposals.valid, overlaps, 0), 1, initial=0) >= 0.5)
        code = jnp.where(drawn.positive, code[drawn.index], NEITHER)
        return everything[drawn.index], code, weight, covered

    def _pool(self, maps: Maps, boxes: jax.Array, bins: int) -> jax.Array:
        """[b, n, 4] -> [b n, bins, bins, c]."""
        choices = self.choices
        pool = functools.partial(
            roi_align,
            bins=bins,
            samples=choices.roi_samples,
            aligned=choices.roi_aligned,
            level_inside=choices.roi_level_inside,
        )
        pooled = jax.vmap(pool)({stride: maps[stride] for stride in sorted(maps)[:POOLED_LEVELS]}, boxes)
        return pooled.reshape(-1, *pooled.shape[2:])

    def _second_stage(self, maps: Maps, boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits [b, n, k + 1] and deltas [b, n, k, 4] of boxes [b, n, 4]."""
        both = self.box_head(self._pool(maps, boxes, BOX_BINS))
        logits, deltas = (a.reshape(*boxes.shape[:2], *a.shape[1:]) for a in both)
        return logits, deltas

    def _draw(self, maps: Maps, boxes: jax.Array, labels: jax.Array, used: jax.Array) -> jax.Array:
        """Mask logits of boxes [b, n, 4] for their own class [b, n]: [b, n, 28, 28].

        Rows that are `used` [b, n] come first. A quarter, half or all of the rows are drawn, as the image with the most
        of them needs, because there are far fewer than n on most images; the others are 0.
        """
        n = boxes.shape[1]

        def first(count: int) -> Callable[..., jax.Array]:
            def draw(detector: MaskRCNN, maps: Maps, boxes: jax.Array, labels: jax.Array) -> jax.Array:
                logits = detector.mask_head(detector._pool(maps, boxes[:, :count], MASK_BINS))
                own = _own(logits, labels[:, :count].reshape(-1)[:, None, None])  # [b n, 28, 28]
                own = own.reshape(-1, count, *own.shape[1:])
                return jnp.pad(own, ((0, 0), (0, n - count), (0, 0), (0, 0)))

            return draw

        counts = [math.ceil(n * share) for share in DRAWN]
        if self.is_initializing() or n < LEAST_CUT:
            return first(n)(self, maps, boxes, labels)
        needed = used.sum(1).max()
        branch = sum((needed > count).astype(jnp.int32) for count in counts[:-1])
        return nn.switch(branch, [first(count) for count in counts], self, maps, boxes, labels)

    def _mask_targets(
        self, truth: Truth, boxes: jax.Array, truth_of: jax.Array, canvas: tuple[int, int], size: int
    ) -> jax.Array:
        """[b, n, size, size] for samples [b, n, 4] that stand for the ground-truth rows `truth_of` [b, n]."""
        boxes = clip(boxes, jnp.asarray(canvas))
        soft = self.choices.soft_mask_targets

        def one(crops: jax.Array, regions: jax.Array, boxes: jax.Array, rows: jax.Array) -> jax.Array:
            return mask_targets(crops[rows], regions[rows], boxes, size=size, soft=soft)

        return jax.vmap(one)(truth["crops"], truth.get("regions", truth["boxes"]), boxes, truth_of)

    def _select(self, logits: jax.Array, deltas: jax.Array, proposals: Proposals, size: jax.Array) -> Detections:
        """The detections of one image from logits [m, k + 1] and deltas [m, k, 4] of its proposals."""
        choices = self.choices
        scores = jax.nn.softmax(logits)[:, :-1]
        clamp = choices.clamp_shrinking
        boxes = clip(decode(proposals.boxes[:, None], deltas, ROI_STD, clamp_shrinking=clamp), size)
        valid = (scores > self.score_threshold) & proposals.valid[:, None]
        if choices.detection_min_side is not None:
            valid &= jnp.all(boxes[..., 2:] - boxes[..., :2] >= choices.detection_min_side, -1)
        labels = jnp.broadcast_to(jnp.arange(self.num_classes), scores.shape)
        return class_nms(
            boxes.reshape(-1, 4),  # [m, k, 4] -> [m k, 4]
            scores.reshape(-1),
            labels.reshape(-1),
            valid.reshape(-1),
            threshold=self.box_nms,
            limit=self.detections,
            candidates=self.candidates,
        )


def _mapped(one: Any, *arrays: Any) -> Any:
    """`one` for every image; the last array may be None, for no randomness."""
    *arrays, keys = arrays
    if keys is None:
        return jax.vmap(lambda *given: one(*given, None))(*arrays)
    return jax.vmap(one)(*arrays, keys)


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """rows [b, g] at index [b, n]: [b, n]."""
    return jnp.take_along_axis(rows, index, 1) if rows.shape[1] else jnp.zeros_like(index)


def _own(x: jax.Array, labels: jax.Array) -> jax.Array:
    """The entry of each row's own class: x [..., k], labels [...] that broadcast to it -> [...].

    A sum in which the others are 0: its gradient is dense, where a gather's would be a scatter.
    """
    return jnp.where(labels[..., None] == align_last(jnp.arange(x.shape[-1]), x), x, 0).sum(-1)
