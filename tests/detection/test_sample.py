import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.detection.assign import BACKGROUND, NEITHER
from halvit_jax.detection.sample import Samples
from halvit_jax.detection.sample import sample as sample_

CODE = jnp.asarray([BACKGROUND, 2, NEITHER, 0, BACKGROUND, BACKGROUND, 1, NEITHER, BACKGROUND, 0])


@functools.partial(jax.jit, static_argnames=("n", "fraction"))
def sample(code: jax.Array, key: jax.Array | None, *, n: int, fraction: float) -> Samples:
    return sample_(code, key, n=n, fraction=fraction)


def test_the_first_candidates_without_a_key() -> None:
    drawn = sample(CODE, None, n=6, fraction=0.34)
    assert drawn.index.tolist() == [1, 3, 0, 4, 5, 8]
    assert drawn.positive.tolist() == [True] * 2 + [False] * 4
    assert drawn.negative.tolist() == [False] * 2 + [True] * 4


@pytest.mark.parametrize("n", [4, 8, 20])
def test_positives_first_then_negatives_then_nothing(n: int) -> None:
    drawn = sample(CODE, jax.random.key(n), n=n, fraction=0.5)
    positives, negatives = min(4, n // 2), min(4, n - min(4, n // 2))
    assert np.flatnonzero(drawn.positive).tolist() == list(range(positives))
    assert np.flatnonzero(drawn.negative).tolist() == list(range(positives, positives + negatives))
    index, positive, negative = (np.asarray(a) for a in drawn)
    code = np.asarray(CODE)
    assert (code[index[positive]] >= 0).all()
    assert (code[index[negative]] == BACKGROUND).all()
    used = index[positive | negative]
    assert len(set(used.tolist())) == len(used)


def test_no_candidates_are_no_samples() -> None:
    for code in (jnp.full(5, NEITHER), jnp.zeros(0, jnp.int32)):
        drawn = sample(code, jax.random.key(0), n=4, fraction=0.5)
        assert not (drawn.positive | drawn.negative).any()
        assert drawn.index.tolist() == [0] * 4


def test_every_candidate_is_drawn_equally_often() -> None:
    code = jnp.asarray([0] * 10 + [BACKGROUND] * 10)
    draw = jax.jit(jax.vmap(lambda key: sample(code, key, n=10, fraction=0.5).index))
    drawn = draw(jax.random.split(jax.random.key(1), 2000))
    counts = np.bincount(np.ravel(drawn), minlength=20)
    assert np.abs(counts - 1000).max() < 110  # five standard deviations


def test_samples_of_an_image_do_not_depend_on_its_batch() -> None:
    codes = jax.random.randint(jax.random.key(3), (8, 200), -2, 3)

    def draw(number: jax.Array, code: jax.Array) -> jax.Array:
        return sample(code, jax.random.fold_in(jax.random.key(7), number), n=16, fraction=0.25).index

    together = jax.jit(jax.vmap(draw))(jnp.arange(8), codes)
    np.testing.assert_array_equal(jax.jit(draw)(5, codes[5]), together[5])
    mesh = jax.make_mesh((8,), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    np.testing.assert_array_equal(jax.jit(jax.vmap(draw), in_shardings=(rows, rows))(jnp.arange(8), codes), together)
