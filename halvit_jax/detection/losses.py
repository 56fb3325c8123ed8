"""Losses of detectors, as sums over the rows that count; the caller divides.

A sum can be added over images and devices before it is divided, so a loss depends on the whole batch and not on how
it is spread. All are computed in float32. A row of weight 0 must be finite; its gradient is 0.

Shapes: `n` rows, `k` classes.
"""

import jax
import jax.numpy as jnp

from halvit_jax.layers.arrays import align_last

FOCAL_GAMMA = 2.0
FOCAL_ALPHA = 0.25


def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """-sum w (t log s(x) + (1 - t) log(1 - s(x))): three arrays of one shape, or that broadcast -> scalar."""
    logits, targets, weights = (a.astype(jnp.float32) for a in (logits, targets, weights))
    return ((jax.nn.softplus(logits) - targets * logits) * weights).sum()


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """-sum w log softmax(x)[label]: [..., k], [...], [...] -> scalar."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    own = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    return -(own * weights.astype(jnp.float32)).sum()


def smooth_l1(prediction: jax.Array, target: jax.Array, weights: jax.Array, *, beta: float = 0.0) -> jax.Array:
    """sum w l(d), l(d) = d^2 / (2 beta) where |d| < beta and |d| - beta / 2 elsewhere: [..., 4], [..., 4] -> scalar.

    d = prediction - target; beta = 0 is the L1 distance. `weights` [...] count all four numbers of a row. Girshick
    2015 (arXiv 1504.08083, equation 3) has beta = 1.
    """
    prediction, target, weights = (a.astype(jnp.float32) for a in (prediction, target, weights))
    distance = jnp.abs(prediction - target)
    if beta:
        distance = jnp.where(distance < beta, 0.5 * distance**2 / beta, distance - 0.5 * beta)
    return (distance * weights[..., None]).sum()


def focal(
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    gamma: float = FOCAL_GAMMA,
    alpha: float = FOCAL_ALPHA,
) -> jax.Array:
    """-sum w a (1 - p)^gamma log p over rows and classes: logits [..., k], labels [...], weights [...] -> scalar.

    p is the probability given to the truth, s(x) for the row's own class and 1 - s(x) for the others; a is alpha and
    1 - alpha. A label outside of 0..k-1 is background. Lin et al. 2017 (arXiv 1708.02002, equation 5).
    """
    logits, weights = logits.astype(jnp.float32), weights.astype(jnp.float32)
    own = labels[..., None] == align_last(jnp.arange(logits.shape[-1]), logits)
    # Both parts from the logit of the truth, since 1 - s(x) has no digits left where s(x) is near 1.
    truth = jnp.where(own, logits, -logits)
    missed = jnp.exp(gamma * jax.nn.log_sigmoid(-truth))  # (1 - p)^gamma
    losses = -jnp.where(own, alpha, 1 - alpha) * missed * jax.nn.log_sigmoid(truth)
    return (losses * weights[..., None]).sum()
