"""Necks: from a backbone's maps to maps of one width at every stride of a pyramid.

All take {stride: [b, h, w, c]} and return {stride: [b, h, w, width]}, and have no norm and no activation. Sources:
Lin et al. 2017 (arXiv 1612.03144) as mmdetection 3.3 `necks/fpn.py` has it; RetinaNet's (arXiv 1708.02002); SHViT's
(Yun and Ro 2024, arXiv 2401.16456, released detection code).

Shapes: `b` batch, `h w` space, `c` channels.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from halvit_jax.layers.conv import Conv
from halvit_jax.layers.initializers import Dtype

Maps = dict[int, jax.Array]

WIDTH = 256

_conv = functools.partial(
    Conv, use_bias=True, kernel_init=nn.initializers.xavier_uniform(), bias_init=nn.initializers.zeros
)


class FPN(nn.Module):
    """Laterals of every map, each added to what is above it, and a 3x3 convolution on each sum.

    `extra="pool"` adds one stride by subsampling the last output, as Mask R-CNN has it. `extra="conv"` adds two by 3x3
    convolutions of stride 2, the first of them on the backbone's last map, and leaves out stride 4: RetinaNet.
    """

    width: int = WIDTH
    extra: str = "pool"
    dtype: Dtype = None

    @nn.compact
    def __call__(self, maps: Mapping[int, jax.Array]) -> Maps:
        strides = [stride for stride in sorted(maps) if stride >= 8 or self.extra == "pool"]
        laterals = {s: _conv(self.width, dtype=self.dtype, name=f"lateral{s}")(maps[s]) for s in strides}
        return _finish(top_down(laterals), maps[strides[-1]], self.width, self.extra, self.dtype)


class PlainPyramid(nn.Module):
    """A pyramid of the one map of a plain ViT, enlarged bilinearly.

    Laterals for the strides 4, 8 and 16 of a stride-16 map and an FPN of them; the strides 32 and 64 by subsampling.
    `pooled=True` has a fourth lateral on the map pooled by 2, and one stride less by subsampling. With `extra="conv"`
    the strides are RetinaNet's, 8 to 128: it needs `pooled`.

    A 1x1 convolution commutes with bilinear enlargement, whose weights sum to 1, so laterals come before it.
    """

    width: int = WIDTH
    pooled: bool = False
    extra: str = "pool"
    dtype: Dtype = None

    @nn.compact
    def __call__(self, maps: Mapping[int, jax.Array]) -> Maps:
        if self.extra == "conv" and not self.pooled:
            raise ValueError("RetinaNet's strides start at 8, for which a plain backbone needs detector.neck='plain4'")
        ((stride, x),) = maps.items()
        laterals, last = {}, x
        for factor in (4, 2, 1):
            if self.extra == "conv" and factor == 4:
                continue
            lateral = _conv(self.width, dtype=self.dtype, name=f"lateral{stride // factor}")(x)
            laterals[stride // factor] = _enlarge(lateral, factor)
        if self.pooled:
            last = nn.max_pool(x, (2, 2), (2, 2), [(0, n % 2) for n in x.shape[1:3]])
            laterals[2 * stride] = _conv(self.width, dtype=self.dtype, name=f"lateral{2 * stride}")(last)
        levels = _finish(top_down(laterals), last, self.width, self.extra, self.dtype)
        while self.extra == "pool" and len(levels) < 5:
            coarsest = max(levels)
            levels[2 * coarsest] = levels[coarsest][:, ::2, ::2]
        return levels


class SHViTPyramid(nn.Module):
    """SHViT's neck, for maps of the strides 16, 32 and 64.

    Finer maps grow out of the sum at stride 16 by 2x2 transposed convolutions of stride 2: two of them for Mask R-CNN,
    strides 4 to 64. With `extra="conv"`, which RetinaNet asks for, one of them, and stride 128 by subsampling.
    """

    width: int = WIDTH
    extra: str = "pool"
    dtype: Dtype = None

    @nn.compact
    def __call__(self, maps: Mapping[int, jax.Array]) -> Maps:
        laterals = {s: _conv(self.width, dtype=self.dtype, name=f"lateral{s}")(maps[s]) for s in sorted(maps)}
        sums = top_down(laterals)
        stride, x = min(sums), sums[min(sums)]
        for _ in range(1 if self.extra == "conv" else 2):
            stride //= 2
            x = sums[stride] = Enlarge(self.width, dtype=self.dtype, name=f"enlarge{stride}")(x)
        levels = {s: _conv(self.width, 3, dtype=self.dtype, name=f"output{s}")(sums[s]) for s in sorted(sums)}
        if self.extra == "conv":
            levels[2 * max(levels)] = levels[max(levels)][:, ::2, ::2]
        return levels


class Enlarge(nn.Module):
    """A transposed 2x2 convolution of stride 2: [b, h, w, c] -> [b, 2h, 2w, f]. Each pixel becomes four."""

    features: int
    kernel_init: Callable[..., jax.Array] = nn.initializers.xavier_uniform()
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        kernel = self.param("kernel", self.kernel_init, (2, 2, c, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        # One product for all four, then the four interleaved.
        wide = kernel.transpose(2, 0, 1, 3).reshape(c, -1)  # [2, 2, c, f] -> [c, 2 2 f]
        y = (x @ wide).reshape(b, h, w, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)  # [b, h, 2, w, 2, f]
        return y.reshape(b, 2 * h, 2 * w, self.features) + bias[None, None, None]


class FeatureNorms(nn.Module):
    """A LayerNorm of its own on each map of a backbone that ends without one, as Swin's detectors have."""

    epsilon: float = 1e-5
    dtype: Dtype = None

    @nn.compact
    def __call__(self, maps: Mapping[int, jax.Array]) -> Maps:
        return {
            s: nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=f"norm{s}")(x) for s, x in sorted(maps.items())
        }


def top_down(laterals: Mapping[int, jax.Array]) -> Maps:
    """Each map plus the sum above it, enlarged to its size by nearest neighbours."""
    sums: Maps = {}
    above = None
    for stride in sorted(laterals, reverse=True):
        x = laterals[stride]
        above = sums[stride] = x if above is None else x + nearest(above, x.shape[1], x.shape[2])
    return dict(sorted(sums.items()))


def nearest(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Row i of the result is row floor(i h / rows): [b, h, w, c] -> [b, rows, columns, c]; columns likewise."""
    for axis, size in ((1, rows), (2, columns)):
        old = x.shape[axis]
        if size in (2 * old, 2 * old - 1):
            # The same rows as the formula gives; and the gradient is a sum, where a gather's would be a scatter.
            x = jax.lax.slice_in_dim(jnp.repeat(x, 2, axis), 0, size, axis=axis)
        elif size != old:
            x = jnp.take(x, jnp.arange(size) * old // size, axis=axis)
    return x


def _finish(sums: Maps, last: jax.Array, width: int, extra: str, dtype: Dtype) -> Maps:
    """The output convolutions and the strides beyond them; called within a compact module."""
    levels = {s: _conv(width, 3, dtype=dtype, name=f"output{s}")(x) for s, x in sums.items()}
    coarsest = max(levels)
    if extra == "pool":
        levels[2 * coarsest] = levels[coarsest][:, ::2, ::2]
    else:
        x = last
        for stride in (2 * coarsest, 4 * coarsest):
            x = levels[stride] = _conv(width, 3, 2, dtype=dtype, name=f"output{stride}")(x)
    return levels


def _enlarge(x: jax.Array, factor: int) -> jax.Array:
    """Bilinear, half-pixel centres."""
    b, h, w, c = x.shape
    return x if factor == 1 else jax.image.resize(x, (b, factor * h, factor * w, c), "bilinear")


NECKS: dict[str, Callable[..., nn.Module]] = {
    "fpn": FPN,
    "plain": PlainPyramid,
    "plain4": functools.partial(PlainPyramid, pooled=True),
    "shvit": SHViTPyramid,
}
