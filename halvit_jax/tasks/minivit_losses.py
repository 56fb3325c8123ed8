"""MiniViT's self-attention and hidden-state distillation losses (Zhang et al., 2022, arXiv 2204.07154, section 3.3).

They compare relations between tokens, because the widths of student and teacher differ.

Shapes: `b` batch, `n` tokens, `c` width of one network, `m` windows of all images or the images themselves.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from halvit_jax.tasks.losses import cross_entropy
from halvit_jax.trees import flatten, natural_key

HIDDEN_SCALE = 49  # of the loss over hidden states: as released, the number of tokens in a window
SMALLEST = 1e-12  # length that a token is divided by


def layers_of(intermediates: Mapping[str, Any], name: str) -> list[Any]:
    """The intermediates sown as `name`, one a layer, in the order of the network."""
    leaves = flatten(intermediates)
    return [leaves[path] for path in sorted(leaves, key=natural_key) if path.split("/")[-2] == name]


def qkv_relation(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The cross-entropy of the student's relations under the teacher's, in one layer: [m, n, 3 c], ... -> [m].

    A relation is a row of softmax(X Y^T / sqrt(c)), with X, Y among queries, keys and values of full width c. The mean
    is over the nine pairs (X, Y) and the n rows. The widths may differ.
    """
    logits, targets = (_relations(x) for x in (student, teacher))  # [m, 3, 3, n, n]
    return cross_entropy(logits, jax.nn.softmax(targets)).mean((1, 2, 3))


def hidden_relation(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """49 times the mean square of S_s - S_t, with S = A A^T the cosines between all tokens of an image: [b].

    Inputs are the outputs of one layer, [b, tokens ..., c]; the widths may differ. For many tokens,
    |S_s - S_t|^2 = |A_s^T A_s|^2 + |A_t^T A_t|^2 - 2 |A_s^T A_t|^2 needs matrices of c x c only.
    """
    student, teacher = (_directions(x) for x in (student, teacher))
    n = student.shape[1]
    if n <= max(student.shape[-1], teacher.shape[-1]):
        student, teacher = (jnp.einsum("bnc,bmc->bnm", x, x) for x in (student, teacher))
        squares = jnp.square(student - teacher).sum((1, 2))
    else:
        # The terms nearly cancel, so they must be exact also if products are rounded to bfloat16 by default.
        pairs = itertools.combinations_with_replacement((student, teacher), 2)
        own, both, others = (jnp.einsum("bnc,bnd->bcd", x, y, precision="highest") for x, y in pairs)
        own, both, others = (jnp.square(x).sum((1, 2)) for x in (own, both, others))
        squares = own + others - 2 * both
    return HIDDEN_SCALE * squares / n**2


def _relations(qkv: jax.Array) -> jax.Array:
    """[m, n, 3 c] -> [m, 3, 3, n, n], in float32."""
    x = qkv.astype(jnp.float32).reshape(*qkv.shape[:2], 3, -1)  # [m, n, 3, c]
    return jnp.einsum("mnic,mkjc->mijnk", x * x.shape[-1] ** -0.5, x)


def _directions(x: jax.Array) -> jax.Array:
    """Tokens of length 1, [b, n, c], in float32."""
    x = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), SMALLEST**2))
