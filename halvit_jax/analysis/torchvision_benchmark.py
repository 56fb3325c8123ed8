"""torchvision's Mask R-CNN of a config's ResNet, canvas, proposals and samples, to be timed beside ours.

`bench --what=detect --against=torch` uses it. torch and torchvision are the user's, no dependency of this package.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from halvit_jax.protocols import Array
from halvit_jax.text import pip_install

BACKBONES = ("resnet18", "resnet50", "resnet101")
TRAINABLE = 3  # stages that train: stem and stage 1 are frozen, as in our recipes


class TorchvisionMaskRCNN:
    """torchvision's model in its own conventions, with random weights, on one random batch.

    Args:
        config: a config of Mask R-CNN on a ResNet.
        fields: the values of our detector, defaults included: proposals, samples, thresholds.
        batch: a batch of `Detection.batch_spec`; images fill their canvas.

    Raises:
        ValueError: torch or torchvision is missing, or the config is of another detector.
    """

    def __init__(self, config: ConfigDict, fields: Any, batch: Mapping[str, Array]) -> None:
        self.check(config)
        import torch
        from torchvision.models.detection import MaskRCNN
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        self._torch = torch
        height, width = (int(side) for side in batch["image"].shape[1:3])
        backbone = resnet_fpn_backbone(backbone_name=config.model.name, weights=None, trainable_layers=TRAINABLE)
        self._model = MaskRCNN(
            backbone,
            num_classes=config.detection.num_classes + 1,
            min_size=min(height, width),
            max_size=max(height, width),
            rpn_pre_nms_top_n_train=fields.train_candidates,
            rpn_pre_nms_top_n_test=fields.test_candidates,
            rpn_post_nms_top_n_train=fields.train_proposals,
            rpn_post_nms_top_n_test=fields.test_proposals,
            rpn_nms_thresh=fields.rpn_nms,
            rpn_batch_size_per_image=fields.rpn_samples,
            box_batch_size_per_image=fields.roi_samples,
            box_positive_fraction=fields.roi_positives,
            box_score_thresh=fields.score_threshold,
            box_nms_thresh=fields.box_nms,
            box_detections_per_img=fields.detections,
        )
        with torch.no_grad():
            classifier = self._model.roi_heads.box_predictor.cls_score  # as `detection_benchmark.likely`
            classifier.bias[1] = float(np.log(0.1 * config.detection.num_classes))
            for block in backbone.body.modules():
                last = getattr(block, "bn3", getattr(block, "bn2", None))
                if hasattr(block, "downsample") and last is not None:
                    last.weight.zero_()  # as `model.zero_init_residual`
        rate = config.optim.learning_rate / 100  # random weights: as small as in a warm-up
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.SGD(trained, rate, momentum=0.9, weight_decay=config.optim.weight_decay)
        images = (
            np.asarray(batch["image"]).transpose(0, 3, 1, 2).astype(np.float32) / 255
        )  # [b, h, w, c] -> [b, c, h, w]
        self._images = list(torch.from_numpy(images))
        self._targets = [self._target(batch, row) for row in range(len(images))]

    @staticmethod
    def check(config: ConfigDict) -> None:
        """Raise the errors of the constructor, without building anything."""
        name = config.model.name
        if config.task.name != "detection" or config.detection.detector != "mask_rcnn" or name not in BACKBONES:
            raise ValueError(
                f"--against=torch compares with torchvision's Mask R-CNN on {', '.join(BACKBONES)}; give such a "
                "--config, such as configs/coco_mask_rcnn.py:resnet50"
            )
        try:
            import torch  # noqa: F401
            import torchvision  # noqa: F401
        except ImportError as error:
            command = pip_install("torch", "torchvision")
            raise ValueError(f"--against=torch needs torch and torchvision ({error}): {command}") from error

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def infer(self) -> None:
        """Run one batch of inference to the end."""
        self._model.eval()
        with self._torch.no_grad():
            self._model(self._images)

    def train(self) -> None:
        """Run one training step to the end."""
        self._model.train()
        loss = sum(self._model(self._images, self._targets).values())
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def _target(self, batch: Mapping[str, Array], row: int) -> dict[str, Any]:
        """The objects of an image as torchvision takes them; their masks fill their boxes."""
        real = np.asarray(batch["real"][row])
        boxes, labels = (np.asarray(batch[name][row])[real] for name in ("boxes", "label"))
        masks = np.zeros((len(boxes), *batch["image"].shape[1:3]), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().astype(int), strict=True):
            mask[y1:y2, x1:x2] = 1
        tensor = self._torch.from_numpy
        return {"boxes": tensor(boxes.copy()), "labels": tensor(labels.astype(np.int64) + 1), "masks": tensor(masks)}
