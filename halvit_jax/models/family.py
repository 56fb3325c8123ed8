"""A model family: its class and all data about it. Each model file ends with its own."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn

from halvit_jax.layers import batch_norm
from halvit_jax.trees import Rules, TransferRules

Fields = dict[str, Any]  # of a model class


class Published(NamedTuple):
    """A result on ImageNet-1k in a paper or by torchvision; none of these was measured here."""

    top1: float  # percent
    source: str  # which paper, and how the model was trained
    params: str = ""  # as printed, where that differs from the exact count


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family, registered by its line in `models.FAMILIES`.

    Args:
        model: the class. It takes `train` as a keyword, and has the fields `num_classes`, `image_size`, `in_channels`,
            `dtype` and `remat` and the method `features`.
        sizes: {model name: fields that differ from the class's defaults}.
        partition_rules: a rule for every parameter path.
        transfer_rules: arrays that may be adapted when weights of another model initialise this one.
        tiny: fields of a model small enough for tests in seconds, with a block of each kind.
        fold: folds the batch normalisations of the model's variables, for inference.
        published: {model name: its published result}.
        baselines: {model name: name of the model it is derived from and compared with}.
        neck: what a detector makes its pyramid of the model's maps with, a key of `detection.pyramid.NECKS`.
        feature_norms: a detector normalises the maps, because they are not normalised by the model.
    """

    model: type[nn.Module]
    sizes: dict[str, Fields]
    partition_rules: Rules
    transfer_rules: TransferRules
    tiny: Fields
    fold: Callable[[Mapping[str, Any]], dict[str, Any]] = batch_norm.fold
    published: Mapping[str, Published] = dataclasses.field(default_factory=dict)
    baselines: Mapping[str, str] = dataclasses.field(default_factory=dict)
    neck: str = "fpn"
    feature_norms: bool = False

    @property
    def field_types(self) -> dict[str, Any]:
        """The model class's own fields: {name: type}."""
        return {f.name: f.type for f in dataclasses.fields(self.model) if f.name not in ("parent", "name")}
