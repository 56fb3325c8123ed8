"""Losses over class scores. Shapes: `b` batch, `c` classes."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-sum_c targets log softmax(logits), for targets [b, c] that sum to 1 -> [b]."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross-entropy averaged over the classes, for targets [b, c] in [0, 1] -> [b] (ResNet A1-A3)."""
    per_class = -targets * jax.nn.log_sigmoid(logits) - (1 - targets) * jax.nn.log_sigmoid(-logits)
    return per_class.mean(axis=-1)


def any_label_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log of the probability of all classes that are right, bool [b, c] with at least one a row -> [b]."""
    return -jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=-1, where=labels)


def hard_distillation(logits: jax.Array, teacher: jax.Array, tau: float) -> jax.Array:
    """Cross-entropy with the teacher's best class; `tau` is not used: [b, c], [b, c] -> [b] (DeiT)."""
    del tau
    return cross_entropy(logits, jax.nn.one_hot(teacher.argmax(-1), teacher.shape[-1]))


def soft_distillation(logits: jax.Array, teacher: jax.Array, tau: float) -> jax.Array:
    """tau^2 KL(teacher || student) / c, both softened by the temperature `tau`: [b, c], [b, c] -> [b].

    As in DeiT and Mini-DeiT it is divided by c, because PyTorch's mean is over all elements.
    """
    own, theirs = (jax.nn.log_softmax(x / tau) for x in (logits, teacher))
    return tau**2 * jnp.mean(jnp.exp(theirs) * (theirs - own), axis=-1)


def soft_cross_entropy(logits: jax.Array, teacher: jax.Array, tau: float) -> jax.Array:
    """Cross-entropy with the teacher's probabilities, both softened by `tau`: [b, c], [b, c] -> [b] (Mini-Swin)."""
    return cross_entropy(logits / tau, jax.nn.softmax(teacher / tau))


DISTILL_LOSSES = {"hard": hard_distillation, "soft": soft_distillation, "soft_cross_entropy": soft_cross_entropy}


LOSSES = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}


def smooth_one_hot(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Labels [b] as targets [b, c]: `1 - smoothing` on the class plus `smoothing / c` on every class."""
    return jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes
