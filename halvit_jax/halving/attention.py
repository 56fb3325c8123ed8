"""Tied attention from a trained one, by alternating least squares in float64.

A head uses its matrices only as products: B_h = Wq_h Wk_h^T in the logits and G_h = Wv_h Wo_h in the output. So a basis
of each head is free, and a tied attention, Q = x A, K = x C, V = x C^T, output = o A^T, has to fit

    B_h = A_h C^hT      G_h = C_h^T A_h^T      A_h, C^h: the columns of head h; C_h: the rows of head h

with four square matrices' worth of equations in two, which the data's covariances weight:

    J(A, C) = sum_h |S^1/2 (A_h C^hT - B_h) T^1/2|^2 / b  +  weight sum_h |S^1/2 (C_h^T A_h^T - G_h)|^2 / g

S = E[x x^T], T the same for x less the mean of its image (a constant added to all keys leaves the softmax alone), b and
g the values of both sums at A = 0. J is quadratic in A and in C; each half of a round solves one exactly.

Shapes: `d` width, `h` heads, `k` width of a head (d = h k).
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg

from halvit_jax.halving.moments import Covariances

PROXIMAL = 1e-12  # weight of the distance to the last iterate, which makes singular solves unique
CONVERGED = 1e-4  # relative decrease of J in a round below which the rounds end
EXACT = 1e-20  # of J, which is 1 + weight at A = 0


class Heads(NamedTuple):
    """The matrices of an attention, head by head, each [h, d, k]; the last is that of the output, transposed."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray


class TiedHeads(NamedTuple):
    """The kernels of a tied attention [d, d], of equal norms, and J before the rounds and after each."""

    query_output: np.ndarray  # A
    key_value: np.ndarray  # C
    objective: list[float]


def split(query: np.ndarray, key: np.ndarray, value: np.ndarray, output: np.ndarray, *, num_heads: int) -> Heads:
    """The heads of kernels [d, d], of which the last maps the heads' outputs back."""
    return Heads(*(_heads(matrix.astype(np.float64), num_heads) for matrix in (query, key, value, output.T)))


def averaged(heads: Heads) -> TiedHeads:
    """The naive tying, (Wq + Wo^T) / 2 and (Wk + Wv^T) / 2, for comparison."""
    return TiedHeads(
        _matrix(heads.query + heads.output) / 2, (_matrix(heads.key) + _matrix(heads.value).T) / 2, objective=[]
    )


def tie(heads: Heads, covariances: Covariances, *, rounds: int, weight: float = 1.0) -> TiedHeads:
    """The A and C of least J after at most `rounds` rounds.

    The rounds start from whichever has the least J after one solve for C: the leading left vectors of [B_h, G_h^T], or
    a matrix of the attention itself, which is exact where it is tied already.
    """
    problem = _Problem(heads, covariances, weight)
    starts = [_subspaces(heads), *(_matrix(each) for each in (heads.query, heads.output))]
    fits = [(a, problem.solve_c(a, np.zeros_like(a))) for a in starts]
    a, c = min(fits, key=lambda fit: problem.objective(*fit))
    objective = [problem.objective(a, c)]
    for _ in range(rounds):
        if objective[-1] < EXACT:
            break
        a = problem.solve_a(a, c)
        c = problem.solve_c(a, c)
        objective.append(problem.objective(a, c))
        if objective[-2] - objective[-1] < CONVERGED * objective[-2]:
            break
    norms = np.linalg.norm(a), np.linalg.norm(c)
    scale = np.sqrt(norms[1] / norms[0]) if all(norms) else 1.0  # of no effect on B_h and G_h
    return TiedHeads(a * scale, c / scale, objective)


class _Problem:
    """J and its two halves, for the heads of one attention."""

    def __init__(self, heads: Heads, covariances: Covariances, weight: float) -> None:
        self._heads, self._plain, self._centred = heads, *covariances
        self._values, self._vectors = np.linalg.eigh(self._plain)
        query, key = (_gram(each, matrix) for each, matrix in ((heads.query, self._plain), (heads.key, self._centred)))
        value, output = _gram(heads.value, self._plain), _inner(heads.output, heads.output)
        self._logits, self._outputs = np.sum(query * key), np.sum(value * output)
        self._logit_weight = 1.0 / (self._logits or 1.0)
        self._output_weight = weight / (self._outputs or 1.0)

    def objective(self, a: np.ndarray, c: np.ndarray) -> float:
        heads, plain, centred = self._heads, self._plain, self._centred
        a, columns, rows = self._split(a, c)
        logits = np.sum(_gram(a, plain) * _gram(columns, centred)) + self._logits
        logits -= 2.0 * np.sum(_inner(a, plain @ heads.query) * _inner(columns, centred @ heads.key))
        outputs = np.sum(_gram(rows, plain) * _inner(a, a)) + self._outputs
        outputs -= 2.0 * np.sum(_inner(rows, plain @ heads.value) * _inner(a, heads.output))
        return float(max(self._logit_weight * logits + self._output_weight * outputs, 0.0))

    def solve_c(self, a: np.ndarray, before: np.ndarray) -> np.ndarray:
        """The C of least J: w T C S1 + v S2 C S = R, diagonal in the bases of the pencils (S2, T) and (S1, S)."""
        heads, plain, centred = self._heads, self._plain, self._centred
        a = _heads(a, len(heads.query))
        s1 = scipy.linalg.block_diag(*_gram(a, plain)) * self._logit_weight
        s2 = scipy.linalg.block_diag(*_inner(a, a)) * self._output_weight
        columns = centred @ heads.key @ _inner(heads.query, plain @ a)
        rows = _transposed(plain @ heads.value @ _inner(heads.output, a))
        right = self._logit_weight * _matrix(columns) + self._output_weight * rows.reshape(before.shape)
        d2, p = scipy.linalg.eigh(s2, centred)
        d1, q = scipy.linalg.eigh(s1, plain)
        denominators = np.maximum(d1, 0.0) + np.maximum(d2, 0.0)[:, None]
        proximal = PROXIMAL * denominators.mean() + np.finfo(float).tiny
        last = p.T @ centred @ before @ plain @ q
        return p @ ((p.T @ right @ q + proximal * last) / (denominators + proximal)) @ q.T

    def solve_a(self, before: np.ndarray, c: np.ndarray) -> np.ndarray:
        """The A of least J: w S A_h M1 + v A_h M2 = R, a product of k unknowns for each eigenvalue of S."""
        heads, plain, centred = self._heads, self._plain, self._centred
        before, columns, rows = self._split(before, c)
        found = []
        for h, last in enumerate(before):
            m1 = self._logit_weight * columns[h].T @ centred @ columns[h]
            m2 = self._output_weight * rows[h].T @ plain @ rows[h]
            right = self._logit_weight * plain @ heads.query[h] @ (heads.key[h].T @ centred @ columns[h])
            right += self._output_weight * heads.output[h] @ (heads.value[h].T @ plain @ rows[h])
            matrices = self._values[:, None, None] * m1 + m2  # [d, k, k]
            proximal = PROXIMAL * np.trace(matrices, axis1=1, axis2=2).mean() / len(m1) + np.finfo(float).tiny
            rotated = self._vectors.T @ (right + proximal * last)
            solved = np.linalg.solve(matrices + proximal * np.eye(len(m1)), rotated[..., None])[..., 0]
            found.append(self._vectors @ solved)
        return _matrix(np.stack(found))

    def _split(self, a: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A_h, C^h and C_h^T, each [h, d, k]."""
        return tuple(_heads(matrix, len(self._heads.query)) for matrix in (a, c, c.T))


def _subspaces(heads: Heads) -> np.ndarray:
    """A_h = the k leading left vectors of [U S of B_h, U S of G_h^T], each scaled to the norm 1."""
    found = []
    for query, key, value, output in zip(*heads, strict=True):
        parts = []
        for left, right in ((query, key), (output, value)):
            scaled = left @ scipy.linalg.qr(right, mode="economic")[1].T  # the left vectors of left @ right.T
            parts.append(scaled / max(np.linalg.norm(scaled), np.finfo(float).tiny))
        found.append(np.linalg.svd(np.concatenate(parts, axis=1), full_matrices=False)[0][:, : query.shape[1]])
    return _matrix(np.stack(found))


def _heads(matrix: np.ndarray, num_heads: int) -> np.ndarray:
    """[d, h k] -> [h, d, k]."""
    return matrix.reshape(len(matrix), num_heads, -1).transpose(1, 0, 2)


def _matrix(heads: np.ndarray) -> np.ndarray:
    """[h, d, k] -> [d, h k]."""
    return heads.transpose(1, 0, 2).reshape(heads.shape[1], -1)


def _transposed(heads: np.ndarray) -> np.ndarray:
    return heads.transpose(0, 2, 1)


def _inner(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """L_h^T R_h of each head: [h, k, k]."""
    return _transposed(left) @ right


def _gram(heads: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """M_h^T S M_h of each head: [h, k, k]."""
    return _inner(heads, matrix @ heads)
