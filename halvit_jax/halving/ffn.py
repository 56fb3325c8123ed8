"""The start of a tied feed-forward layer, W^T gelu(W^T norm(x) + b1) + b2, from W2 gelu(W1 norm(x) + b1) + b2.

A tied layer is the gradient of a scalar potential: on the normalised input its Jacobian W D W^T has no negative part
where gelu' > 0, so with positive scales of the norm it can hardly contract. Negative scales let it. The signed balance
chooses them: with rows W1[i] of the input channels, columns W2[:, i] of the output channels,

    r_i = sign(<W1[i], W2[:, i]>) |W1[i]| / |W2[:, i]|     norm's scale and bias *= r,  W1[i] /= r_i       (exact)
    u_j = (|W2[j]| / |W1[:, j]|)^1/2                        W = (W1 u + W2^T / u) / 2,  b1 *= u     (GELU: approximate)

Where W2 = W1^T already, nothing changes. Shapes: `d` width, `f` hidden.
"""

from typing import NamedTuple

import numpy as np

TINY = np.finfo(np.float64).tiny


class NormedFfn(NamedTuple):
    """A norm and the dense layer behind it."""

    scale: np.ndarray  # [d]
    shift: np.ndarray  # [d], the norm's bias
    expand: np.ndarray  # W1 [d, f]
    hidden_bias: np.ndarray  # b1 [f]
    reduce: np.ndarray  # W2 [f, d]
    bias: np.ndarray  # b2 [d]


class NormedTiedFfn(NamedTuple):
    """A norm and the tied layer behind it."""

    scale: np.ndarray
    shift: np.ndarray
    kernel: np.ndarray  # W [d, f]
    hidden_bias: np.ndarray
    bias: np.ndarray


def signed_balance(ffn: NormedFfn) -> NormedTiedFfn:
    """The tied layer to start from, in float64."""
    ffn = NormedFfn(*(array.astype(np.float64) for array in ffn))
    signs = np.where(np.sum(ffn.expand * ffn.reduce.T, axis=1) < 0.0, -1.0, 1.0)
    r = signs * _ratio(np.linalg.norm(ffn.expand, axis=1), np.linalg.norm(ffn.reduce, axis=0))
    expand = ffn.expand / r[:, None]
    u = np.sqrt(_ratio(np.linalg.norm(ffn.reduce, axis=1), np.linalg.norm(expand, axis=0)))
    kernel = (expand * u + ffn.reduce.T / u) / 2.0
    return NormedTiedFfn(ffn.scale * r, ffn.shift * r, kernel, ffn.hidden_bias * u, ffn.bias)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 1 where either is 0: such a channel or unit is unused."""
    used = (above > TINY) & (below > TINY)
    return np.where(used, above / np.where(used, below, 1.0), 1.0)
