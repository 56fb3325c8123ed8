"""Heads of detectors, as mmdetection 3.3 has them. All outputs are float32.

- `RPNHead`: `rpn_head.py` (Ren et al. 2015, arXiv 1506.01497), one for all levels.
- `BoxHead`: `Shared2FCBBoxHead` (Lin et al. 2017, arXiv 1612.03144, section 4.2).
- `MaskHead`: `fcn_mask_head.py` (He et al. 2017, arXiv 1703.06870, figure 4).
- `RetinaNetHead`: `retina_head.py` (Lin et al. 2017, arXiv 1708.02002), one for all levels.

Shapes: `b` batch, `h w` a map, `k` anchors at a position, `a` = h w k, `n` boxes, `p` bins a side, `c` channels.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.detection.pyramid import Enlarge
from halvit_jax.layers.conv import Conv
from halvit_jax.layers.initializers import Dtype

_conv = functools.partial(Conv, use_bias=True, bias_init=nn.initializers.zeros)
_kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class RPNHead(nn.Module):
    """Scores and deltas of a map's anchors: [b, h, w, c] -> logits [b, a], deltas [b, a, 4], in (row, column, k)."""

    width: int = 256
    anchors: int = 3  # k
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        conv = functools.partial(_conv, kernel_init=nn.initializers.normal(0.01), dtype=self.dtype)
        x = nn.relu(conv(self.width, 3, name="conv")(x))
        return _rows(conv(self.anchors, name="score")(x), 1)[..., 0], _rows(conv(4 * self.anchors, name="delta")(x), 4)


class BoxHead(nn.Module):
    """Classes and deltas of pooled boxes: [n, p, p, c] -> logits [n, classes + 1], deltas [n, classes, 4].

    The last class is the background, which has no deltas.
    """

    num_classes: int
    hidden: int = 1024
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        x = x.reshape(x.shape[0], -1)  # [n, p, p, c] -> [n, p p c]
        for i in (1, 2):
            x = nn.relu(dense(self.hidden, kernel_init=nn.initializers.xavier_uniform(), name=f"fc{i}")(x))
        logits = dense(self.num_classes + 1, kernel_init=nn.initializers.normal(0.01), name="score")(x)
        deltas = dense(4 * self.num_classes, kernel_init=nn.initializers.normal(0.001), name="delta")(x)
        deltas = deltas.reshape(-1, self.num_classes, 4)  # [n, 4 classes] -> [n, classes, 4]
        return logits.astype(jnp.float32), deltas.astype(jnp.float32)


class MaskHead(nn.Module):
    """A mask for every class of pooled boxes: [n, p, p, c] -> logits [n, 2p, 2p, classes]."""

    num_classes: int
    width: int = 256
    depth: int = 4
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(_conv, kernel_init=_kaiming_fan_out, dtype=self.dtype)
        for i in range(self.depth):
            x = nn.relu(conv(self.width, 3, name=f"conv{i + 1}")(x))
        x = nn.relu(Enlarge(self.width, _kaiming_fan_out, self.dtype, name="enlarge")(x))
        return conv(self.num_classes, name="mask")(x).astype(jnp.float32)


class RetinaNetHead(nn.Module):
    """Classes and deltas of a map's anchors: [b, h, w, c] -> logits [b, a, classes], deltas [b, a, 4]."""

    num_classes: int
    width: int = 256
    depth: int = 4
    anchors: int = 9  # k
    prior: float = 0.01  # probability of every class before training
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        conv = functools.partial(_conv, kernel_size=3, kernel_init=nn.initializers.normal(0.01), dtype=self.dtype)
        prior = nn.initializers.constant(-math.log((1 - self.prior) / self.prior))
        scores = deltas = x
        for i in range(self.depth):
            scores = nn.relu(conv(self.width, name=f"score_conv{i + 1}")(scores))
            deltas = nn.relu(conv(self.width, name=f"delta_conv{i + 1}")(deltas))
        scores = conv(self.anchors * self.num_classes, bias_init=prior, name="score")(scores)
        deltas = conv(self.anchors * 4, name="delta")(deltas)
        return _rows(scores, self.num_classes), _rows(deltas, 4)


def _rows(x: jax.Array, numbers: int) -> jax.Array:
    """A map whose channels are `numbers` for each anchor, as float32 rows: [b, h, w, k numbers] -> [b, a, numbers]."""
    return x.reshape(x.shape[0], -1, numbers).astype(jnp.float32)
