"""Object detection and instance segmentation: images on canvases and their boxes in, detections out.

Shapes: `b` batch, `h w` canvas, `g` rows for objects, `d` detections of an image, `r` side of a cut-out mask.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halvit_jax.detection import coco_metric, create_detector
from halvit_jax.detection.paste import paste, paste_torchvision
from halvit_jax.models import family_of, partition_rules, transfer_rules
from halvit_jax.models.partition import COLUMNS, FILTERS, ROWS, VECTORS
from halvit_jax.protocols import ArraySpec, Batch, DatasetInfo, Loss, PyTree, ServingModel
from halvit_jax.tasks.coco_collector import CocoCollector
from halvit_jax.tasks.drawing import draw
from halvit_jax.trees import Rules, TransferRules, flatten

CROP = 112  # r
SIDES = 32  # what divides the sides of canvases: the largest stride of most backbones; SHViT's neck allows for its 64
INIT_SIDE = 128  # pixels of the images that parameters are made with; their shapes do not depend on it
PICTURES = 4  # images that are drawn
OWN = r"(pyramid|norms|rpn|box_head|mask_head|head)/"  # a detector's parameters outside of its backbone
PARTITION_RULES: Rules = (
    (rf"(?<!backbone/){OWN}.*fc1/kernel$", COLUMNS),
    (rf"(?<!backbone/){OWN}.*fc2/kernel$", ROWS),
    (r"(?<!backbone/)box_head/(score|delta)/kernel$", COLUMNS),
    (rf"(?<!backbone/){OWN}.*kernel$", FILTERS),
    VECTORS,
)


class Detection:
    """Mask R-CNN or RetinaNet on a backbone, a `Task` that is `Servable`.

    Args:
        model: the backbone, without a classifier: `model.features` -> {stride: map}.
        mean, std: of the three colours on the scale of 0 to 1; the model sees (colour - mean) / std.
        canvases: (height, width) of the batches, multiples of 32; the first one is that of `batch_spec`.
        max_objects: g.
        detector: a key of `detection.DETECTORS`.
        metric_backend: a key of `detection.coco_metric.BACKENDS`, of the evaluation.
        fields: those of the detector; None leaves a default. An empty `neck`: that of the backbone's family.
    """

    units: Mapping[str, str] = {"rpn_positives": "%", "roi_positives": "%", "positives": "%", "proposal_recall": "%"}

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        canvases: Sequence[tuple[int, int]],
        max_objects: int,
        detector: str = "mask_rcnn",
        metric_backend: str = "pycocotools",
        **fields: Any,
    ) -> None:
        if model.num_classes:
            raise ValueError(
                f"model.num_classes={model.num_classes} must be 0 for task.name='detection'; the number of classes of "
                "a detector is detection.num_classes"
            )
        family = family_of(model)
        fields["neck"] = fields.get("neck") or family.neck
        fields["feature_norms"] = family.feature_norms
        self.model = create_detector(detector, model, dtype=model.dtype, **fields)
        self.metric_backend = metric_backend
        self.detector, self.max_objects = detector, max_objects
        if model.in_channels != 3:
            raise ValueError(f"model.in_channels={model.in_channels} must be 3 for task.name='detection'")
        self.canvases = [(int(height), int(width)) for height, width in canvases]
        unit = math.lcm(SIDES, getattr(model, "patch_size", None) or 1)
        for height, width in self.canvases:
            if height % unit or width % unit or height < 1 or width < 1:
                fitting = " x ".join(str(max(-(-side // unit), 1) * unit) for side in (height, width))
                raise ValueError(
                    f"instances.canvases={tuple(self.canvases)}: the strides of {type(model).__name__} do not divide "
                    f"{height} x {width}; make the sides multiples of {unit}, here {fitting}"
                )
        self.constants: PyTree = {}
        self.partition_rules = (*PARTITION_RULES[:-1], *partition_rules(model))
        self._colours = tuple(np.asarray(colours, np.float32)[None, None, None] for colours in (mean, std))
        self.masks = bool(getattr(self.model, "masks", False))
        self._paste = paste if self.model.conventions == "mmdet" else paste_torchvision
        self.primary_metric = "mask_ap" if self.masks else "box_ap"
        self.progress_metrics = ("loss", "proposal_recall")

    @functools.cached_property
    def transfer_rules(self) -> TransferRules:
        """The backbone's rules; what is the detector's own, or a classifier's alone, need not be in both."""
        backbone = self.model.backbone
        images = jnp.zeros((1, backbone.image_size, backbone.image_size, 3))

        def paths(method: str) -> set[str]:
            made = jax.eval_shape(lambda x: backbone.init(jax.random.key(0), x, train=False, method=method), images)
            return set(flatten(made))

        used, whole = paths("features"), paths("__call__")
        left_out = tuple((f"^backbone/{re.escape(path.split('/', 1)[1])}$", "head") for path in whole - used)
        own = tuple((re.sub(r"^\^", "^backbone/", pattern), kind) for pattern, kind in transfer_rules(backbone))
        return ((rf"^{OWN}", "head"), *sorted(left_out), *own)

    def batch_spec(self) -> dict[str, ArraySpec]:
        """A uint8 image on the first canvas, its sizes and number, its objects and its mask."""
        g = self.max_objects
        shapes = {
            "image": ((*self.canvases[0], 3), "uint8"),
            "size": ((2,), "int32"),
            "original": ((2,), "int32"),
            "image_id": ((), "int32"),
            "boxes": ((g, 4), "float32"),
            "label": ((g,), "int32"),
            "real": ((g,), "bool"),
            "mask": ((), "bool"),
        }
        if self.masks:
            shapes["crops"] = ((g, CROP, CROP), "uint8")
        return {name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items()}

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Initial (params, model_state); model_state holds BatchNorm's running statistics, if any."""
        size = jnp.full((1, 2), INIT_SIDE, jnp.int32)
        variables = self.model.init(key, jnp.zeros((1, INIT_SIDE, INIT_SIDE, 3)), size)
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(self, params: PyTree, model_state: PyTree, constants: PyTree, batch: Batch, key: jax.Array) -> Loss:
        """The sum of the detector's losses; `sums` have each of them, and the detector's metrics.

        What is drawn for an image depends on `key` and its row in the batch alone, not on the devices.
        """
        del constants
        drop_key, sample_key = jax.random.split(key)
        made, new_state = self.model.apply(
            {"params": params, **model_state},
            self.normalise(batch["image"]),
            batch,
            sample_key,
            method="losses",
            mutable=list(model_state),
            rngs={"drop_path": drop_key},
        )
        loss = sum(made.losses.values(), jnp.zeros(()))
        means = {"loss": loss, **{f"{name}_loss": value for name, value in made.losses.items()}, **made.metrics}
        examples = jnp.sum(batch["mask"]).astype(jnp.float32)
        sums = {name: value * examples for name, value in means.items()}
        return Loss(loss, dict(new_state), {**sums, "examples": examples})

    def score(self, params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """The detections of every image, boxes in pixels of the canvas."""
        return self._detect({"params": params, **model_state}, *(batch[name] for name in SERVED))

    def collector(self, info: DatasetInfo) -> CocoCollector:
        """COCO's metrics over all images of the annotation file of `info`."""
        files = info.extra["eval_annotations"], info.extra["category_ids"]
        return CocoCollector(*files, masks=self.masks, backend=self.metric_backend, paste=self._paste)

    def summary_images(self, batch: Batch) -> dict[str, jax.Array]:
        """The first images of a batch with their objects."""
        batch = {name: values[:PICTURES] for name, values in batch.items()}
        images = batch["image"].astype(jnp.float32) / 255.0
        crops = batch["crops"].astype(jnp.float32) / 255.0 if self.masks else None
        return {"train_images": draw(images, batch["boxes"], batch["label"], batch["real"], crops)}

    def normalise(self, images: jax.Array) -> jax.Array:
        """Images of 0 to 255 [b, h, w, 3] as inputs of the model."""
        mean, std = self._colours
        return (images.astype(jnp.float32) / 255.0 - mean) / std

    def check_dataset(self, info: DatasetInfo) -> None:
        """Raise a ValueError unless the detector has the data set's number of classes."""
        classes = len(info.class_names)
        if classes != self.model.num_classes:
            raise ValueError(
                f"detection.num_classes={self.model.num_classes}, but instances.name={info.name!r} has {classes} "
                f"classes; set detection.num_classes={classes}"
            )

    def serving(self, variables: PyTree, *, folded: bool = True) -> ServingModel:
        """Images on a canvas and their sizes there -> detections; norms stay as they are."""
        del folded
        return ServingModel(self._detect, variables, self.canvases[0], inputs=SERVED)

    def decode(self, outputs: PyTree, info: DatasetInfo) -> list[dict[str, Any]]:
        """The detections of each image: {"detections": [{"class", "category_id", "bbox", "score"}, ...]}.

        They are in the form of COCO's results: a box is x, y, width, height. It is in pixels of the canvas, or, if
        `outputs` has `size` and `original` too, in those of the file, with the mask as RLE, "segmentation".
        """
        outputs = {name: np.asarray(values) for name, values in outputs.items()}
        return [
            {"detections": self._listed({name: values[row] for name, values in outputs.items()}, info)}
            for row in range(len(outputs["valid"]))
        ]

    def _listed(self, one: Mapping[str, np.ndarray], info: DatasetInfo) -> list[dict[str, Any]]:
        """The detections of one image, in order of score."""
        valid = one["valid"].astype(bool)
        ratio = one["original"] / one["size"] if "original" in one else np.ones(2)  # of rows and columns
        boxes = one["boxes"][valid] * np.tile(ratio[::-1], 2)
        numbers = info.extra.get("category_ids", range(len(info.class_names)))
        found: list[dict[str, Any]] = []
        for box, score, label in zip(boxes.tolist(), one["scores"][valid], one["labels"][valid], strict=True):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            one_found = {"class": info.class_names[int(label)], "category_id": numbers[int(label)], "bbox": bbox}
            found.append({**one_found, "score": float(score)})
        if self.masks and "original" in one:
            height, width = (int(side) for side in one["original"])
            for detection, mask, box in zip(found, one["masks"][valid], boxes, strict=True):  # one bitmap at a time
                drawn = self._paste(mask[None], box[None], height, width)
                (detection["segmentation"],) = coco_metric.encode_masks(drawn)
        return found

    def _detect(self, variables: PyTree, images: jax.Array, size: jax.Array) -> dict[str, jax.Array]:
        """`boxes` [b, d, 4], `scores`, `labels`, `valid` [b, d], `masks` [b, d, 28, 28], `truncated` [b]."""
        return self.model.apply(variables, self.normalise(images), size)


SERVED = ("image", "size")
