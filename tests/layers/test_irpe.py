import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.layers.irpe import ContextualRelativePosition, grid_buckets, piecewise_index

GRID, K = (3, 6), 4


def _index(offset: int) -> int:
    """The definition, for one number."""
    if abs(offset) <= 1.9:
        return offset
    far = min(round(1.9 + math.log(abs(offset) / 1.9) / math.log(15.2 / 1.9) * (3.8 - 1.9)), 3.8)
    return int(math.copysign(far, offset))


def test_near_offsets_are_kept_apart_and_far_ones_are_one() -> None:
    offsets = np.arange(-30, 31)
    assert piecewise_index(offsets).tolist() == [_index(int(offset)) for offset in offsets]
    assert piecewise_index(np.arange(24)).tolist() == [0, 1, 2, 2] + [3] * 20


def test_a_bucket_is_of_rows_and_columns_from_the_query_on() -> None:
    buckets = grid_buckets(GRID)
    assert buckets.shape == (18, 18)
    for query in range(18):
        for key in range(18):
            rows, columns = query // 6 - key // 6, query % 6 - key % 6
            assert buckets[query, key] == (_index(rows) + 3) * 7 + _index(columns) + 3
    assert set(grid_buckets((7, 7)).flat) == set(range(49))


@pytest.mark.parametrize("before", [0, 1, 2])
def test_each_query_is_multiplied_with_the_vector_of_the_offset(before: int) -> None:
    rng = np.random.default_rng(0)
    n, buckets = 18 + before, 49 + (before > 0)
    query, table = rng.standard_normal((2, 3, n, K)), rng.standard_normal((K, buckets))
    layer = ContextualRelativePosition()
    shapes = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, GRID), jnp.asarray(query))
    assert shapes["params"]["table"].shape == (K, buckets)
    added = layer.apply({"params": {"table": table.astype(np.float32)}}, jnp.asarray(query, jnp.float32), GRID)
    expected = np.zeros((2, 3, n, n))
    for i in range(n):
        for j in range(n):
            bucket = grid_buckets(GRID)[i - before, j - before] if min(i, j) >= before else 49
            expected[:, :, i, j] = query[:, :, i] @ table[:, bucket]
    np.testing.assert_allclose(added, expected, rtol=1e-4, atol=1e-5)
