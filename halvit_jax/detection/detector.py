"""The part that all detectors share: a backbone, norms on its maps where it ends without one, and a neck.

A backbone is a Flax module with `features(images, *, train, frozen_norms) -> {stride: [b, h, w, c]}`; its parameters
are the detector's below `backbone/`.

Ground truth is a mapping of arrays, one row an image, with padding rows at the end of each:

- `size` int32 [b, 2]: the rows and columns of the canvas that are image
- `boxes` [b, g, 4] in pixels of the canvas, `label` int32 [b, g] from 0, `real` bool [b, g]: the row is a box
- `crops` [b, g, r, r]: each object's mask inside of its `regions` [b, g, 4], which default to its box; see
  `targets.mask_targets`
- `mask` bool [b], if there are images that only fill the batch: they have no part in any loss

Shapes: `b` batch, `h w` canvas, `g` ground-truth rows.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halvit_jax.detection.anchors import Anchors, inside_flags
from halvit_jax.detection.conventions import CONVENTIONS, Conventions
from halvit_jax.detection.pyramid import NECKS, FeatureNorms, Maps
from halvit_jax.layers.initializers import Dtype

Truth = Mapping[str, jax.Array]


class Losses(NamedTuple):
    """Losses of a batch, already divided, and metrics to watch."""

    losses: dict[str, jax.Array]  # scalars; training minimises their sum
    metrics: dict[str, jax.Array]  # scalars


class Detector(nn.Module):
    """Normalised images on a canvas -> maps of one width at every stride.

    Raises ValueError, naming the config field, for a neck or conventions that are not in `NECKS` and `CONVENTIONS`.
    """

    backbone: nn.Module
    num_classes: int = 80
    neck: str = "fpn"  # a key of NECKS
    feature_norms: bool = False  # a LayerNorm on each of the backbone's maps, for a backbone that ends without one
    width: int = 256  # of the pyramid
    train_norms: bool = False  # whether batch statistics move in training; else the backbone's norms are in evaluation
    conventions: str = "mmdet"  # a key of CONVENTIONS
    dtype: Dtype = None  # the neck and the heads compute in it; boxes, scores and losses are float32

    extra = "pool"  # which strides the neck adds

    def __post_init__(self) -> None:
        for field, allowed in (("neck", NECKS), ("conventions", CONVENTIONS)):
            if getattr(self, field) not in allowed:
                given = getattr(self, field)
                raise ValueError(f"detector.{field}={given!r} is not one of {', '.join(allowed)}")
        if self.num_classes < 1:
            raise ValueError(f"detector.num_classes={self.num_classes} must be at least 1")
        super().__post_init__()

    @property
    def choices(self) -> Conventions:
        """The conventions by their name."""
        return CONVENTIONS[self.conventions]

    def setup(self) -> None:
        if self.feature_norms:
            self.norms = FeatureNorms(dtype=self.dtype)
        self.pyramid = NECKS[self.neck](width=self.width, extra=self.extra, dtype=self.dtype)

    def features(self, images: jax.Array, size: jax.Array, *, train: bool) -> Maps:
        """The pyramid of images [b, h, w, 3] of which `size` [b, 2] rows and columns are no padding."""
        # Padding is zero behind the normalisation, whatever it was before.
        rows, columns = (jnp.arange(images.shape[i])[None] for i in (1, 2))
        inside = (rows < size[:, :1])[:, :, None] & (columns < size[:, 1:])[:, None]
        images = jnp.where(inside[..., None], images, 0)
        maps = self.backbone.features(images, train=train, frozen_norms=not self.train_norms)
        if self.feature_norms:
            maps = self.norms(maps)
        return self.pyramid(maps)

    def usable(self, size: jax.Array, level_shapes: dict[int, tuple[int, int]], anchors: int) -> jax.Array:
        """The anchors of an image that training may match, `anchors` at each position of all levels: bool [a]."""
        if self.choices.anchors_of_canvas:
            return jnp.ones(anchors * sum(rows * columns for rows, columns in level_shapes.values()), bool)
        return inside_flags(size, level_shapes, anchors)


def grids(anchors: Anchors, maps: Maps, canvas: Sequence[int], *, whole_steps: bool) -> list[np.ndarray]:
    """The anchors of every level of a pyramid, in order: [a, 4] each."""
    made = []
    for stride, level in sorted(maps.items()):
        rows, columns = level.shape[1:3]
        step = (canvas[0] // rows, canvas[1] // columns) if whole_steps else None
        made.append(anchors.grid(rows, columns, stride, step))
    return made


def shapes(maps: Maps) -> dict[int, tuple[int, int]]:
    """Rows and columns of every level, by stride and in order."""
    return {stride: level.shape[1:3] for stride, level in sorted(maps.items())}


def counted(truth: Truth) -> jax.Array:
    """True for images that are not padding of the batch: bool [b]."""
    return truth.get("mask", jnp.ones(truth["size"].shape[0], bool))


def image_keys(key: jax.Array | None, images: int) -> jax.Array | None:
    """A key for each image, from its number in the global batch; None stays None."""
    return None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(images))
