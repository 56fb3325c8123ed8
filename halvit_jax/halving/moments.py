"""Second moments of a layer's inputs, streamed in float64.

Shapes: `b` images, `n` tokens, `d` width.
"""

from typing import NamedTuple

import numpy as np

RIDGE = 1e-6  # added to the diagonal, relative to its mean: a normalised token lacks one direction


class Covariances(NamedTuple):
    """Regularised second moments [d, d] of tokens: positive definite."""

    plain: np.ndarray  # E[x x^T]
    centred: np.ndarray  # the same for x less the mean of its image's tokens


class Moments:
    """Sums over batches of tokens; the batches may be of any size and are not kept."""

    def __init__(self, width: int) -> None:
        self._plain, self._means = np.zeros((width, width)), np.zeros((width, width))
        self.tokens = self.images = 0

    def add(self, tokens: np.ndarray) -> None:
        """Add the tokens of some images [b, n, d]."""
        wide = tokens.astype(np.float64)
        flat, means = wide.reshape(-1, wide.shape[-1]), wide.mean(1)
        self._plain += flat.T @ flat
        self._means += wide.shape[1] * means.T @ means
        self.tokens += len(flat)
        self.images += len(means)

    def covariances(self) -> Covariances:
        """The moments of all tokens so far."""
        plain, centred = self._plain / self.tokens, (self._plain - self._means) / self.tokens
        return Covariances(_regularised(plain), _regularised(centred))


def identity(width: int) -> Covariances:
    """The moments of white tokens, where there are no images."""
    return Covariances(np.eye(width), np.eye(width))


def _regularised(matrix: np.ndarray) -> np.ndarray:
    size = np.trace(matrix) / len(matrix)
    return (matrix + matrix.T) / 2 + RIDGE * size * np.eye(len(matrix))
