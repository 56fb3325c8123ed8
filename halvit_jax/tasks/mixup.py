"""Mixing on the device, before the loss: Mixup, CutMix and random erasing.

Every function is pure in its key. Shapes: `b` batch, `h w` space, `c` classes; images are normalised floats.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betaincinv

QUANTILES = 2**14
ERASE_ATTEMPTS = 10  # timm's
ERASE_FILLS = ("noise", "zero")  # timm's "pixel" and torchvision's default


def mixup(
    key: jax.Array, images: jax.Array, targets: jax.Array, *, alpha: float, per_image: bool = False
) -> tuple[jax.Array, jax.Array]:
    """lam x + (1 - lam) x', lam ~ Beta(alpha, alpha), one for the batch or one for each image.

    The partner x' is the batch reversed.
    """
    lam = _beta(key, alpha, _shape(images, per_image))
    return _blend(images, lam), _blend(targets, lam)


def cutmix(
    key: jax.Array, images: jax.Array, targets: jax.Array, *, alpha: float, per_image: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Paste a box of the reversed batch, of area 1 - lam, lam ~ Beta(alpha, alpha); targets mix by the pasted area.

    One box for the batch or one for each image.
    """
    beta_key, row_key, column_key = jax.random.split(key, 3)
    lam = _beta(beta_key, alpha, _shape(images, per_image))
    h, w = images.shape[1:3]
    rows = _span(row_key, h, jnp.sqrt(1.0 - lam))
    columns = _span(column_key, w, jnp.sqrt(1.0 - lam))
    box = rows[..., :, None] & columns[..., None, :]  # [h, w] or [b, h, w]
    whole = box if per_image else box[None]
    mixed = jnp.where(whole[..., None], images[::-1], images)
    return mixed, _blend(targets, 1.0 - box.mean((-2, -1)))


def mixup_or_cutmix(
    key: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    switch: float,
    per_image: bool = False,
    group: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """CutMix with probability `switch`, else Mixup; an alpha of 0 disables that one.

    The choice and its numbers are drawn for the batch, or for each image. `group` rows in turn are mixed as a batch of
    their own, with draws and partners of their own; 0, or no more rows than that: the whole batch.

    Raises:
        ValueError: `group` does not divide a larger batch.
    """
    if not mixup_alpha and not cutmix_alpha:
        return images, targets
    count = count_groups("classification.mix_group", group, len(images))
    if count > 1:
        alphas = {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha}
        mix_group = functools.partial(mixup_or_cutmix, **alphas, switch=switch, per_image=per_image)
        rows = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), (images, targets))
        mixed = jax.vmap(mix_group)(jax.random.split(key, count), *rows)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), mixed)
    mix = functools.partial(mixup, images=images, targets=targets, alpha=mixup_alpha, per_image=per_image)
    cut = functools.partial(cutmix, images=images, targets=targets, alpha=cutmix_alpha, per_image=per_image)
    if not cutmix_alpha:
        return mix(key)
    if not mixup_alpha:
        return cut(key)
    choice_key, key = jax.random.split(key)
    cuts = jax.random.uniform(choice_key, _shape(images, per_image)) < switch
    if not per_image:
        return jax.lax.cond(cuts, lambda: cut(key), lambda: mix(key))
    return tuple(jnp.where(_beside(cuts, a), a, b) for a, b in zip(cut(key), mix(key), strict=True))


def count_groups(field: str, group: int, rows: int) -> int:
    """Into how many groups of `group` rows a batch is cut; 1 where it has no more rows, or for 0.

    Raises:
        ValueError: they do not divide the batch.
    """
    if not 0 < group < rows:
        return 1
    if rows % group:
        raise ValueError(f"{field}={group} must divide the {rows} rows of a batch, or a part of one; 0 is all of them")
    return rows // group


def random_erase(key: jax.Array, images: jax.Array, *, probability: float, fill: str = "noise") -> jax.Array:
    """Fill one box of an image with normal "noise" or with "zero", with this probability for each image.

    The box covers 2 % to a third of the area at an aspect ratio of 0.3 to 3.3, drawn log-uniformly. As in timm a box
    that does not fit is drawn again, at most ten times, and then the image stays as it is.
    """
    if not probability:
        return images
    b, h, w, _ = images.shape
    happen_key, area_key, ratio_key, row_key, column_key, noise_key = jax.random.split(key, 6)
    draws = (b, ERASE_ATTEMPTS)
    area = jax.random.uniform(area_key, draws, minval=0.02, maxval=1 / 3) * h * w
    ratio = jnp.exp(jax.random.uniform(ratio_key, draws, minval=jnp.log(0.3), maxval=jnp.log(1 / 0.3)))
    heights, widths = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (heights < h) & (widths < w)
    first = jnp.argmax(fits, axis=1, keepdims=True)  # the first True
    rows, columns = (
        _spans(key, size, jnp.take_along_axis(lengths, first, axis=1)[:, 0])
        for key, size, lengths in ((row_key, h, heights), (column_key, w, widths))
    )
    happens = jax.random.bernoulli(happen_key, probability, (b,)) & fits.any(axis=1)
    box = happens[:, None, None] & rows[:, :, None] & columns[:, None, :]  # [b, h, w]
    filling = jax.random.normal(noise_key, images.shape, images.dtype) if fill == "noise" else jnp.zeros_like(images)
    return jnp.where(box[..., None], filling, images)


def _shape(images: jax.Array, per_image: bool) -> tuple[int, ...]:
    return images.shape[:1] if per_image else ()


def _beta(key: jax.Array, alpha: float, shape: tuple[int, ...]) -> jax.Array:
    """Draws from Beta(alpha, alpha), among 16,384 equally likely quantiles.

    jax.random.beta uses rejection loops, which take XLA seconds to compile, twice in every training step.
    """
    quantiles = betaincinv(alpha, alpha, (np.arange(QUANTILES) + 0.5) / QUANTILES)
    return jnp.asarray(quantiles, jnp.float32)[jax.random.randint(key, shape, 0, QUANTILES)]


def _beside(number: jax.Array, x: jax.Array) -> jax.Array:
    """One number as it is, or one for each of [b] reshaped to broadcast against x [b, ...]."""
    return number.reshape(-1, *(1,) * (x.ndim - 1)) if number.ndim else number


def _blend(x: jax.Array, lam: jax.Array) -> jax.Array:
    lam = _beside(lam, x)
    wide = x.astype(lam.dtype)
    return (lam * wide + (1.0 - lam) * wide[::-1]).astype(x.dtype)


def _span(key: jax.Array, size: int, fraction: jax.Array) -> jax.Array:
    """About `fraction * size` places around a uniformly drawn centre, cut at the ends: bool [..., size]."""
    half = jnp.floor(size * fraction).astype(jnp.int32)[..., None] // 2
    centre = jax.random.randint(key, fraction.shape, 0, size)[..., None]
    place = jnp.arange(size).reshape((1,) * fraction.ndim + (size,))
    return (place >= centre - half) & (place < centre + half)


def _spans(key: jax.Array, size: int, lengths: jax.Array) -> jax.Array:
    """A random span of each length [b] within the size: bool [b, size]."""
    start = jnp.floor(jax.random.uniform(key, lengths.shape) * (size - lengths + 1))
    place = jnp.arange(size, dtype=start.dtype)[None]
    return (place >= start[:, None]) & (place < (start + lengths)[:, None])
