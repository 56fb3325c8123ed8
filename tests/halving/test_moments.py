"""Second moments of tokens against those of all tokens at once."""

import numpy as np

from halvit_jax.halving import moments


def test_moments_of_batches_are_those_of_all_tokens() -> None:
    tokens = np.random.default_rng(0).standard_normal((7, 5, 4)).astype(np.float32) + 3.0
    found = moments.Moments(4)
    for part in (tokens[:2], tokens[2:6], tokens[6:]):
        found.add(part)
    assert (found.images, found.tokens) == (7, 35)
    plain, centred = found.covariances()
    wide = tokens.astype(np.float64)
    flat, less = wide.reshape(-1, 4), (wide - wide.mean(1, keepdims=True)).reshape(-1, 4)
    for matrix, rows in ((plain, flat), (centred, less)):
        expected = rows.T @ rows / 35
        np.testing.assert_allclose(matrix, expected + 1e-6 * np.trace(expected) / 4 * np.eye(4), rtol=1e-10)


def test_moments_of_normalised_tokens_are_positive_definite() -> None:
    """A normalised token has no mean over its channels, so its covariance lacks a direction."""
    tokens = np.random.default_rng(0).standard_normal((20, 9, 6))
    tokens -= tokens.mean(-1, keepdims=True)
    found = moments.Moments(6)
    found.add(tokens)
    assert all(np.linalg.eigvalsh(matrix).min() > 0 for matrix in found.covariances())


def test_white_tokens_have_the_identity() -> None:
    assert all(np.array_equal(matrix, np.eye(3)) for matrix in moments.identity(3))
