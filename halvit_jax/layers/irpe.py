"""iRPE: contextual relative positions, the "product" variant on keys.

Kan Wu, Houwen Peng, Minghao Chen, Jianlong Fu, Hongyang Chao, "Rethinking and Improving Relative Position Encoding for
Vision Transformer", 2021, https://arxiv.org/abs/2107.14222.

    logits[i, j] += q_i . r[bucket(i, j)]

with q_i the scaled query and one learned vector r for each of 49 buckets of offsets on the grid, shared by the heads.

Shapes: `b` batch, `h` heads, `n` tokens, `u v` their grid, `k` width of a head, `t` buckets.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

# Offsets up to ALPHA have their own indices; further ones are binned on a logarithmic scale up to GAMMA.
ALPHA, BETA, GAMMA = 1.9, 3.8, 15.2
LAST = int(BETA)
BUCKETS = (2 * LAST + 1) ** 2


class ContextualRelativePosition(nn.Module):
    """The term that iRPE adds to the logits: scaled queries [b, h, n, k] -> [b, h, n, n].

    The last u v tokens are those of a grid, row by row. All pairs with a token before them (a class token) have one
    more bucket in common, as in the paper.
    """

    @nn.compact
    def __call__(self, query: jax.Array, grid: tuple[int, int]) -> jax.Array:
        extra = query.shape[2] - math.prod(grid)
        table = self.param("table", nn.initializers.zeros, (query.shape[-1], BUCKETS + (extra > 0)))
        products = jnp.einsum("bhnk,kt->bhnt", query, table.astype(query.dtype))
        index = np.pad(grid_buckets(grid), ((extra, 0), (extra, 0)), constant_values=BUCKETS)
        return jnp.take_along_axis(products, index[None, None], axis=-1, mode="clip")


def grid_buckets(grid: tuple[int, int]) -> np.ndarray:
    """The bucket of every pair of tokens of a grid, [n, n] (query, key): rows and columns have an index each."""
    places = np.indices(grid).reshape(2, -1)  # [2, n]
    rows, columns = piecewise_index(places[:, :, None] - places[:, None, :])
    return (rows + LAST) * (2 * LAST + 1) + columns + LAST


def piecewise_index(offset: np.ndarray) -> np.ndarray:
    """The paper's piecewise function of whole offsets, odd and from -3 to 3: 0, 1, 2, 2, 3, 3, ... of 0, 1, 2, ..."""
    far = np.maximum(np.abs(offset), ALPHA)
    index = np.round(ALPHA + np.log(far / ALPHA) / math.log(GAMMA / ALPHA) * (BETA - ALPHA))
    index = np.where(np.abs(offset) <= ALPHA, np.abs(offset), np.minimum(index, BETA))
    return (np.sign(offset) * index).astype(np.int32)
