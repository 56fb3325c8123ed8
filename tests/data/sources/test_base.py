import itertools

import numpy as np
import pytest
import tensorflow as tf

from halvit_jax.data.sources.base import Source, position_shard, shard_bounds


def _positions(data: tf.data.Dataset) -> list[int]:
    return [int(entry["position"]) for entry in data]


@pytest.mark.parametrize(("size", "count"), [(50, 1), (50, 7), (50, 50), (3, 5)])
def test_shards_are_consecutive_and_equal_to_within_one(size: int, count: int) -> None:
    shards = [_positions(position_shard(size, index, count)) for index in range(count)]
    assert list(itertools.chain(*shards)) == list(range(size))
    lengths = list(map(len, shards))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1
    assert [tuple(map(int, shard_bounds(size, i, count))) for i in range(count)] == list(
        itertools.pairwise(itertools.accumulate(lengths, initial=0))
    )


def test_a_seed_shuffles_a_shard_the_same_way_each_time() -> None:
    seeds = [tf.constant(seed, tf.int64) for seed in (1, 1, 2)]
    first, again, other = (_positions(position_shard(240, 1, 4, seed)) for seed in seeds)
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(60, 120))
    assert abs(np.corrcoef(first, range(60))[0, 1]) < 0.5


def test_a_source_diagnoses_nothing_by_default() -> None:
    class Empty(Source):
        pass

    assert Empty().diagnose(tf.errors.DataLossError(None, None, "lost")) == ""
