"""Image classification: uint8 images and labels in, cross-entropy out."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halvit_jax.models import fold, norm_groups, partition_rules, transfer_rules
from halvit_jax.models.intermediates import capture
from halvit_jax.protocols import ArraySpec, Batch, DatasetInfo, Loss, PyTree, ServingModel
from halvit_jax.tasks import mixup
from halvit_jax.tasks.losses import LOSSES, any_label_cross_entropy, cross_entropy, smooth_one_hot, weighted
from halvit_jax.tasks.metrics import MeanCollector, best_label, classification_sums
from halvit_jax.tasks.mixup import ERASE_FILLS
from halvit_jax.text import first_few

MAX_WEIGHTS = 20  # classes up to which their weights are spelt out
UNBALANCED = 5  # times as many images of one class as of another, above which that is worth a word
TOP = 5  # classes that `decode` lists
MIXUP_MODES = ("batch", "elem")


class Classification:
    """Image classification, a `Task` that is `Servable`.

    Training: normalise, erase, smooth the labels, mix, apply, average the loss over the real rows. The order is timm's:
    erasing before mixing, smoothing inside the mixed target. The metrics are plain cross-entropy, top-1 and top-5.

    Args:
        model: `model.apply({"params": ...}, images, train=...)` -> logits [b, num_classes].
        mean, std: of each channel on the scale of 0 to 1; the model sees (channel - mean) / std.
        loss: a key of LOSSES, for training.
        bce_threshold: where above 0 and the loss is binary, targets above it count as 1 and all others as 0.
        class_weights: weight of each class: the loss of an image is multiplied by the mean over its target; () is 1.
        label_smoothing: fraction of a target spread over all classes.
        mixup, cutmix: the alphas of their Beta distributions; 0 is off.
        mixup_switch: probability of CutMix where both are on.
        mixup_mode: one draw for the whole "batch", or one for each element ("elem").
        mix_group: rows of a batch that share a draw and are each other's partners; 0: all of them.
        norm_group: rows over which batch normalisations take their statistics in training; 0: all of them.
        erase: probability of random erasing.
        erase_fill: what fills the erased box: "noise" or "zero".
    """

    primary_metric = "top1"
    progress_metrics = ("loss", "top1")
    units: Mapping[str, str] = {"top1": "%", "top5": "%"}

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        loss: str = "cross_entropy",
        bce_threshold: float = 0.0,
        class_weights: Sequence[float] = (),
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_switch: float = 0.5,
        mixup_mode: str = "batch",
        mix_group: int = 0,
        norm_group: int = 0,
        erase: float = 0.0,
        erase_fill: str = "noise",
    ) -> None:
        if model.num_classes < 1:
            raise ValueError(f"model.num_classes={model.num_classes} must be at least 1 to train a classifier")
        if loss not in LOSSES:
            raise ValueError(f"classification.loss={loss!r} is not one of {', '.join(LOSSES)}")
        if mixup_mode not in MIXUP_MODES:
            raise ValueError(f"classification.mixup_mode={mixup_mode!r} is not one of {', '.join(MIXUP_MODES)}")
        if erase_fill not in ERASE_FILLS:
            raise ValueError(f"classification.erase_fill={erase_fill!r} is not one of {', '.join(ERASE_FILLS)}")
        if bce_threshold and loss != "binary_cross_entropy":
            raise ValueError(
                f"classification.bce_threshold={bce_threshold} is for classification.loss='binary_cross_entropy', not "
                f"{loss!r}"
            )
        if class_weights and (len(class_weights) != model.num_classes or min(class_weights) < 0):
            raise ValueError(
                f"classification.class_weights={tuple(class_weights)} must be one number >= 0 for each of "
                f"model.num_classes={model.num_classes} classes"
            )
        for name, values in {"mean": mean, "std": std}.items():
            if len(values) != model.in_channels:
                raise ValueError(
                    f"task.{name}={tuple(values)} has {len(values)} values, but model.in_channels={model.in_channels}; "
                    "give one for each channel"
                )
        shares = {"label_smoothing": label_smoothing, "mixup_switch": mixup_switch, "erase": erase}
        for name, value in (shares | {"bce_threshold": bce_threshold}).items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"classification.{name}={value} must lie between 0 and 1")
        amounts = {"mixup": mixup, "cutmix": cutmix, "mix_group": mix_group, "norm_group": norm_group}
        for name, value in amounts.items():
            if value < 0:
                raise ValueError(f"classification.{name}={value} must not be negative")
        self.model = model
        self.constants: PyTree = {}
        self.partition_rules, self.transfer_rules = partition_rules(model), transfer_rules(model)
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        self._loss = weighted(LOSSES[loss], class_weights) if class_weights else LOSSES[loss]
        self._label_smoothing = label_smoothing
        self._mixing = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "switch": mixup_switch}
        self._mixing |= {"per_image": mixup_mode == "elem", "group": mix_group}
        self._norm_group = norm_group
        self._bce_threshold = bce_threshold
        self._erase = {"probability": erase, "fill": erase_fill}

    def batch_spec(self) -> dict[str, ArraySpec]:
        """A uint8 image, its label and its mask."""
        shapes = {
            "image": ((*self._input_size, self.model.in_channels), "uint8"),
            "label": ((), "int32"),
            "mask": ((), "bool"),
        }
        return {name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items()}

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Initial (params, model_state); model_state holds BatchNorm's running statistics, if any."""
        variables = self.model.init(key, jnp.zeros((1, *self._input_size, self.model.in_channels)), train=False)
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(self, params: PyTree, model_state: PyTree, constants: PyTree, batch: Batch, key: jax.Array) -> Loss:
        """The mean training loss over the rows where mask is True, and the sums of the plain scores."""
        del constants
        drop_key, augment_key = jax.random.split(key)
        images, targets = self._training_inputs(batch, augment_key)
        with self._norm_groups(batch):
            logits, new_state = self.model.apply(
                {"params": params, **model_state},
                images,
                train=True,
                mutable=list(model_state),
                rngs={"drop_path": drop_key},
            )
        loss = self._loss(logits, targets)
        sums = classification_sums(loss, logits, batch["label"], batch["mask"])
        return Loss(sums["loss"] / jnp.maximum(sums["examples"], 1.0), dict(new_state), sums)

    def predict(self, params: PyTree, model_state: PyTree, batch: Batch) -> jax.Array:
        """Logits [b, num_classes] in inference."""
        return self.model.apply({"params": params, **model_state}, self.normalise(batch["image"]), train=False)

    def score(self, params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Sums of plain cross-entropy, top-1 and top-5 over the real rows, and their number.

        Where the data have several labels an image, `label` is bool [b, c]: an answer is right if it is any of them,
        the loss is that of their summed probability, and an image without labels does not count (ImageNet-ReaL).
        """
        logits, label, mask = self.predict(params, model_state, batch), batch["label"], batch["mask"]
        if label.ndim == 2:
            loss = any_label_cross_entropy(logits, label)
            return classification_sums(loss, logits, best_label(logits, label), mask & label.any(-1))
        targets = smooth_one_hot(label, logits.shape[-1], 0.0)
        return classification_sums(cross_entropy(logits, targets), logits, label, mask)

    def collector(self, info: DatasetInfo) -> MeanCollector:
        """The means over all examples."""
        return MeanCollector()

    def summary_images(self, batch: Batch) -> dict[str, Any]:
        """The first 64 images of a batch, augmented."""
        images, _ = self._training_inputs(batch, jax.random.key(0))
        mean, std = self._colours
        seen = 3 if self.model.in_channels >= 3 else 1  # of more channels the first three are shown
        return {"train_images": jnp.clip(images[:64] * std + mean, 0.0, 1.0)[..., :seen]}

    def normalise(self, images: jax.Array) -> jax.Array:
        """Images of 0 to 255 [b, h, w, c] as inputs of the model."""
        mean, std = self._colours
        return (images.astype(jnp.float32) / 255.0 - mean) / std

    def check_dataset(self, info: DatasetInfo) -> None:
        """Raise a ValueError unless the data set has two classes or more, and the classifier as many."""
        classes = len(info.class_names)
        if classes == 1:
            raise ValueError(
                f"data.name={info.name!r} has the one class {info.class_names[0]!r}, so there is nothing to learn; a "
                "class is a folder of its own"
            )
        if classes != self.model.num_classes:
            raise ValueError(
                f"model.num_classes={self.model.num_classes}, but data.name={info.name!r} has {classes} classes; "
                f"set model.num_classes={classes}"
            )

    def check_records(self, records: Iterable[Mapping[str, Any]], info: DatasetInfo) -> tuple[str, str]:
        """Images per class in the training split: (summary, warning about classes without an image)."""
        counts = Counter(int(record["label"]) for record in records)
        numbers = [counts[label] for label in range(len(info.class_names))]
        empty = [name for name, number in zip(info.class_names, numbers, strict=True) if not number]
        warning = f"{len(empty)} classes of data.train_split have no image: {first_few(empty)}" if empty else ""
        line = f"{len(numbers)} classes of {min(numbers):,} to {max(numbers):,} images"
        if max(numbers) > UNBALANCED * max(min(numbers), 1):
            weights = ",".join(f"{sum(numbers) / len(numbers) / max(number, 1):.3g}" for number in numbers)
            hint = (
                f"--config.data.balance=1 draws them equally often, --config.classification.class_weights='({weights})'"
            )
            warning = "; ".join(filter(None, [warning, f"{hint} weights their loss" if len(numbers) <= 20 else hint]))
        return line, warning

    def serving(self, variables: PyTree, *, folded: bool = True) -> ServingModel:
        """Images -> logits [b, num_classes]; `folded` merges batch normalisations into the layers before them."""
        model, variables = fold(self.model, variables) if folded else (self.model, variables)

        def apply(variables: PyTree, images: jax.Array) -> jax.Array:
            return model.apply(variables, self.normalise(images), train=False)

        def captured(variables: PyTree, images: jax.Array) -> dict[str, dict[str, jax.Array]]:
            return capture(model, variables, self.normalise(images))

        return ServingModel(apply, variables, self._input_size, captured, channels=self.model.in_channels)

    def decode(self, outputs: PyTree, info: DatasetInfo, *, top: int = TOP) -> list[dict[str, Any]]:
        """The most probable classes: [{"top5": [{"class", "probability"}, ...]}, ...]."""
        probabilities = np.asarray(jax.nn.softmax(outputs))
        best = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top]
        return [
            {f"top{top}": [{"class": info.class_names[i], "probability": round(float(row[i]), 6)} for i in order]}
            for row, order in zip(probabilities, best, strict=True)
        ]

    @property
    def _colours(self) -> tuple[np.ndarray, np.ndarray]:
        """`mean` and `std`, [1, 1, 1, c]."""
        return self.mean[None, None, None], self.std[None, None, None]

    @property
    def _input_size(self) -> tuple[int, int]:
        return self.model.image_size, self.model.image_size

    def _norm_groups(self, batch: Batch) -> contextlib.AbstractContextManager[None]:
        rows = len(batch["mask"])
        return norm_groups(mixup.count_groups("classification.norm_group", self._norm_group, rows))

    def _training_inputs(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        erase_key, mix_key = jax.random.split(key)
        images = mixup.random_erase(erase_key, self.normalise(batch["image"]), **self._erase)
        targets = smooth_one_hot(batch["label"], self.model.num_classes, self._label_smoothing)
        images, targets = mixup.mixup_or_cutmix(mix_key, images, targets, **self._mixing)
        if self._bce_threshold:
            targets = (targets > self._bce_threshold).astype(targets.dtype)
        return images, targets
