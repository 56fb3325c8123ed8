"""The start of a tied feed-forward layer."""

import math

import numpy as np
import pytest

from halvit_jax.halving import ffn

WIDTH, HIDDEN = 5, 8


def layer(seed: int = 0) -> ffn.NormedFfn:
    rng = np.random.default_rng(seed)
    vectors = [rng.standard_normal(size) for size in (WIDTH, WIDTH, HIDDEN, WIDTH)]
    expand, reduce = rng.standard_normal((WIDTH, HIDDEN)), rng.standard_normal((HIDDEN, WIDTH))
    return ffn.NormedFfn(vectors[0], vectors[1], expand, vectors[2], reduce, vectors[3])


def run(x: np.ndarray, made: ffn.NormedFfn | ffn.NormedTiedFfn) -> np.ndarray:
    expand, reduce = (made.kernel, made.kernel.T) if hasattr(made, "kernel") else (made.expand, made.reduce)
    h = (x * made.scale + made.shift) @ expand + made.hidden_bias
    return h * np.vectorize(math.erfc)(-h * 2**-0.5) / 2 @ reduce + made.bias


@pytest.mark.parametrize("ratios", [np.ones(WIDTH), np.array([2.0, -1.0, 0.5, -3.0, 1.0])])
def test_a_layer_that_is_tied_up_to_signed_scales_of_its_channels_is_kept(ratios: np.ndarray) -> None:
    given = layer()
    given = given._replace(reduce=given.expand.T * ratios)
    found = ffn.signed_balance(given)
    np.testing.assert_allclose(found.scale, given.scale / ratios)
    x = np.random.default_rng(1).standard_normal((7, WIDTH))
    np.testing.assert_allclose(run(x, found), run(x, given), rtol=1e-10)


def test_units_are_balanced_so_that_both_directions_have_equal_norms() -> None:
    given = layer()
    tied = given._replace(reduce=given.expand.T)
    units = np.arange(1.0, 1.0 + HIDDEN)
    found = ffn.signed_balance(tied._replace(expand=tied.expand / units, reduce=tied.reduce * units[:, None]))
    assert np.all(found.scale * given.scale > 0)
    rows = np.linalg.norm(found.kernel, axis=0)
    assert rows.max() / rows.min() < units.max()  # of W1 alone it would be that of W, times the units


def test_a_channel_or_unit_of_zeros_gives_no_nan() -> None:
    given = layer()
    given.expand[0], given.reduce[:, 1], given.reduce[2] = 0.0, 0.0, 0.0
    assert all(np.isfinite(array).all() for array in ffn.signed_balance(given))
