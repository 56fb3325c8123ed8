"""Mixing on the device, before the loss: Mixup, CutMix and random erasing.

Every function is pure in its key. Shapes: `b` batch, `h w` space, `c` classes; images are normalised floats.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betaincinv

QUANTILES = 2**14


def mixup(key: jax.Array, images: jax.Array, targets: jax.Array, *, alpha: float) -> tuple[jax.Array, jax.Array]:
    """lam x + (1 - lam) x', one lam ~ Beta(alpha, alpha) for the batch; the partner x' is the batch reversed."""
    lam = _beta(key, alpha)
    return _blend(images, lam), _blend(targets, lam)


def cutmix(key: jax.Array, images: jax.Array, targets: jax.Array, *, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Paste one box of the reversed batch, of area 1 - lam, lam ~ Beta(alpha, alpha); targets by the area pasted."""
    beta_key, row_key, column_key = jax.random.split(key, 3)
    lam = _beta(beta_key, alpha)
    h, w = images.shape[1:3]
    rows = _span(row_key, h, jnp.sqrt(1.0 - lam))
    columns = _span(column_key, w, jnp.sqrt(1.0 - lam))
    box = rows[:, None] & columns[None, :]  # [h, w]
    mixed = jnp.where(box[None, :, :, None], images[::-1], images)
    return mixed, _blend(targets, 1.0 - box.mean())


def mixup_or_cutmix(
    key: jax.Array, images: jax.Array, targets: jax.Array, *, mixup_alpha: float, cutmix_alpha: float, switch: float
) -> tuple[jax.Array, jax.Array]:
    """CutMix with probability `switch`, else Mixup; an alpha of 0 leaves that one out, both 0 change nothing."""
    if not mixup_alpha and not cutmix_alpha:
        return images, targets
    if not cutmix_alpha:
        return mixup(key, images, targets, alpha=mixup_alpha)
    if not mixup_alpha:
        return cutmix(key, images, targets, alpha=cutmix_alpha)
    choice_key, key = jax.random.split(key)
    return jax.lax.cond(
        jax.random.uniform(choice_key) < switch,
        lambda: cutmix(key, images, targets, alpha=cutmix_alpha),
        lambda: mixup(key, images, targets, alpha=mixup_alpha),
    )


def random_erase(key: jax.Array, images: jax.Array, *, probability: float) -> jax.Array:
    """Fill one box of an image with normal noise, with this probability for each image.

    The box covers 2 % to a third of the area at an aspect ratio of 0.3 to 3.3, drawn log-uniformly; a box that would
    stick out is cut to the image's size (timm draws again; the difference is a few per cent of the boxes).
    """
    if not probability:
        return images
    b, h, w, _ = images.shape
    happen_key, area_key, ratio_key, row_key, column_key, noise_key = jax.random.split(key, 6)
    area = jax.random.uniform(area_key, (b,), minval=0.02, maxval=1 / 3) * h * w
    ratio = jnp.exp(jax.random.uniform(ratio_key, (b,), minval=jnp.log(0.3), maxval=jnp.log(1 / 0.3)))
    rows = _spans(row_key, h, jnp.round(jnp.sqrt(area * ratio)))
    columns = _spans(column_key, w, jnp.round(jnp.sqrt(area / ratio)))
    happens = jax.random.bernoulli(happen_key, probability, (b,))
    box = happens[:, None, None] & rows[:, :, None] & columns[:, None, :]  # [b, h, w]
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jnp.where(box[..., None], noise, images)


def _beta(key: jax.Array, alpha: float) -> jax.Array:
    """One draw from Beta(alpha, alpha), among 16,384 equally likely quantiles.

    jax.random.beta draws by rejection in loops, which take XLA seconds to compile, twice in every training step.
    """
    quantiles = betaincinv(alpha, alpha, (np.arange(QUANTILES) + 0.5) / QUANTILES)
    return jnp.asarray(quantiles, jnp.float32)[jax.random.randint(key, (), 0, QUANTILES)]


def _blend(x: jax.Array, lam: jax.Array) -> jax.Array:
    return (lam * x + (1.0 - lam) * x[::-1]).astype(x.dtype)


def _span(key: jax.Array, size: int, fraction: jax.Array) -> jax.Array:
    """A stretch of about `fraction * size` places around a uniformly drawn centre, cut at the ends: bool [size]."""
    half = jnp.floor(size * fraction).astype(jnp.int32) // 2
    centre = jax.random.randint(key, (), 0, size)
    place = jnp.arange(size)
    return (place >= centre - half) & (place < centre + half)


def _spans(key: jax.Array, size: int, lengths: jax.Array) -> jax.Array:
    """For each of [b] lengths a stretch of that many places that lies inside: bool [b, size]."""
    lengths = jnp.minimum(lengths, size)
    start = jnp.floor(jax.random.uniform(key, lengths.shape) * (size - lengths + 1))
    place = jnp.arange(size)
    return (place >= start[:, None]) & (place < (start + lengths)[:, None])
