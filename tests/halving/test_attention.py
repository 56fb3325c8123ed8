"""Tying attention: each half of a round against a direct solution, and the whole against teachers of known answers."""

import numpy as np
import pytest

from halvit_jax.halving import attention
from halvit_jax.halving.moments import Covariances

WIDTH, HEADS = 12, 3


def matrices(count: int, *, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((WIDTH, WIDTH)) for _ in range(count)]


def covariances(seed: int = 9) -> Covariances:
    plain, centred = (each @ np.diag(1.0 / np.arange(1, WIDTH + 1)) @ each.T for each in matrices(2, seed=seed))
    return Covariances(plain, centred)


def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values) @ vectors.T


def residuals(a: np.ndarray, c: np.ndarray, kernels: list[np.ndarray], given: Covariances, weight: float) -> np.ndarray:
    """All terms of J, written out: J is the sum of their squares."""
    query, key, value, output = kernels
    s, t = root(given.plain), root(given.centred)
    k, parts = WIDTH // HEADS, []
    sizes = [0.0, 0.0]
    for h in range(HEADS):
        part = slice(h * k, (h + 1) * k)
        b, g = query[:, part] @ key[:, part].T, value[:, part] @ output[part]
        sizes[0] += np.sum((s @ b @ t) ** 2)
        sizes[1] += np.sum((s @ g) ** 2)
        parts.append((s @ (a[:, part] @ c[:, part].T - b) @ t, s @ (c[part].T @ a[:, part].T - g)))
    scales = [sizes[0] ** -0.5, (weight / sizes[1]) ** 0.5]
    return np.concatenate([scale * part.ravel() for pair in parts for scale, part in zip(scales, pair, strict=True)])


def least_squares(function: object, size: int) -> np.ndarray:
    """The minimiser of the squared norm of an affine function."""
    constant = function(np.zeros(size))
    columns = np.stack([function(unit) - constant for unit in np.eye(size)], axis=1)
    return np.linalg.lstsq(columns, -constant, rcond=None)[0]


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_each_half_of_a_round_is_the_solution_of_its_least_squares(weight: float) -> None:
    kernels, given = matrices(4), covariances()
    heads = attention.split(*kernels, num_heads=HEADS)
    problem = attention._Problem(heads, given, weight)
    a, c = matrices(2, seed=1)
    expected = np.sum(residuals(a, c, kernels, given, weight) ** 2)
    assert problem.objective(a, c) == pytest.approx(expected, rel=1e-10)
    direct = least_squares(lambda x: residuals(a, x.reshape(a.shape), kernels, given, weight), a.size)
    np.testing.assert_allclose(problem.solve_c(a, c), direct.reshape(a.shape), atol=1e-6)
    direct = least_squares(lambda x: residuals(x.reshape(a.shape), c, kernels, given, weight), a.size)
    np.testing.assert_allclose(problem.solve_a(a, c), direct.reshape(a.shape), atol=1e-6)


@pytest.mark.parametrize("rank", [2, 4])
def test_the_objective_falls_in_every_round(rank: int) -> None:
    """Also where the heads are of low rank, so that the solves are singular."""
    rng = np.random.default_rng(3)
    mix = [rng.standard_normal((HEADS, WIDTH, rank)) @ rng.standard_normal((HEADS, rank, 4)) for _ in range(4)]
    found = attention.tie(attention.Heads(*mix), covariances(), rounds=30)
    assert len(found.objective) > 3
    assert all(np.diff(found.objective) <= 1e-12)
    assert found.objective[-1] < 0.9 * found.objective[0]


def test_averages_are_far_from_what_the_rounds_find() -> None:
    heads = attention.split(*matrices(4), num_heads=HEADS)
    problem = attention._Problem(heads, covariances(), 1.0)
    naive, found = attention.averaged(heads), attention.tie(heads, covariances(), rounds=25)
    assert found.objective[-1] == pytest.approx(problem.objective(found.query_output, found.key_value))
    assert problem.objective(naive.query_output, naive.key_value) > 1.5 * found.objective[-1]
    assert np.linalg.norm(found.query_output) == pytest.approx(np.linalg.norm(found.key_value))


def test_a_tied_attention_is_recovered_exactly() -> None:
    """Its heads' logits and outputs, for which its own matrices are one of many answers."""
    a, c = matrices(2, seed=5)
    given = covariances()
    found = attention.tie(attention.split(a, c, c.T, a.T, num_heads=HEADS), given, rounds=25)
    assert found.objective[-1] < 1e-14
    left = residuals(found.query_output, found.key_value, [a, c, c.T, a.T], given, 1.0)
    assert np.abs(left).max() < 1e-7


def test_heads_of_zeros_give_zeros_and_no_nan() -> None:
    zeros = [np.zeros((WIDTH, WIDTH))] * 4
    found = attention.tie(attention.split(*zeros, num_heads=HEADS), covariances(), rounds=2)
    assert np.isfinite(found.query_output).all()
    assert np.abs(found.query_output @ found.key_value.T).max() < 1e-12


def test_heads_of_rank_one_are_fitted_by_matrices_of_ordinary_size() -> None:
    """Their solves leave most of A and C undetermined."""
    rng = np.random.default_rng(3)
    mix = [rng.standard_normal((HEADS, WIDTH, 1)) @ rng.standard_normal((HEADS, 1, 4)) for _ in range(4)]
    found = attention.tie(attention.Heads(*mix), covariances(), rounds=10)
    assert found.objective[-1] < 0.1 * found.objective[0]
    assert np.linalg.norm(found.query_output) < 100 * np.linalg.norm(mix)
