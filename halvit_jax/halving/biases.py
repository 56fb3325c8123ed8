"""The biases of an attention that are to become those of the layers around a tied attention without any.

Of the logits (x Wq_h + bq_h) . (x' Wk_h + bk_h) the softmax sees x B_h x'^T and, as a function of the key, bq_h Wk_h^T
x'^T; bk is inert. A shift of the norm's bias before the attention by D gives A_h the same effect,

    D = argmin sum_h |T^1/2 (C^h A_h^T D - Wk_h bq_h)|^2        T: covariance of x, centred in each image

and adds D C_h^T A_h^T to the output of every head. What the teacher adds beside it, bv Wo + bo, less this, is a
constant c of the residual stream, which the layers behind can absorb.

Shapes: `d` width, `h` heads, `k` width of a head.
"""

import numpy as np

from halvit_jax.halving.attention import Heads, TiedHeads, split

RIDGE = 1e-6  # relative, of the least squares


def norm_shift(tied: TiedHeads, heads: Heads, query_bias: np.ndarray, centred: np.ndarray) -> np.ndarray:
    """D [d], from the bias of all queries [d]."""
    a, c = _columns(tied, heads)
    products = c @ a.transpose(0, 2, 1)  # C^h A_h^T: [h, d, d]
    targets = heads.key @ query_bias.astype(np.float64).reshape(len(a), -1, 1)  # [h, d, 1]
    left = np.sum(products.transpose(0, 2, 1) @ centred @ products, axis=0)
    right = np.sum(products.transpose(0, 2, 1) @ centred @ targets, axis=0)[:, 0]
    return _ridge(left, right)


def query_bias(tied: TiedHeads, heads: Heads, given: np.ndarray, centred: np.ndarray) -> np.ndarray:
    """The bias [d] of the tied attention's own queries with the effect of the given one: C^h b_h = Wk_h bq_h."""
    _, c = _columns(tied, heads)
    targets = heads.key @ given.astype(np.float64).reshape(len(c), -1, 1)
    found = [
        _ridge(each.T @ centred @ each, each.T @ centred @ target[:, 0])
        for each, target in zip(c, targets, strict=True)
    ]
    return np.concatenate(found)


def shift_output(tied: TiedHeads, shift: np.ndarray) -> np.ndarray:
    """sum_h D C_h^T A_h^T [d], what a shift of all inputs adds to the output."""
    return (shift @ tied.key_value.T) @ tied.query_output.T


def _columns(tied: TiedHeads, heads: Heads) -> tuple[np.ndarray, np.ndarray]:
    """A_h and C^h: [h, d, k]."""
    both = split(tied.query_output, tied.key_value, tied.key_value, tied.query_output, num_heads=len(heads.query))
    return both.query, both.key


def _ridge(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    size = np.trace(left) / len(left)
    return np.linalg.solve(left + RIDGE * (size or 1.0) * np.eye(len(left)), right)
