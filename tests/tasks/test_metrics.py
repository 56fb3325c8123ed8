import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.tasks.metrics import MeanCollector, best_label, classification_sums, in_top


@pytest.mark.parametrize("k", [1, 2, 5])
def test_in_top_agrees_with_sorting(k: int) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((50, 8)), rng.integers(0, 8, 50)
    expected = [label in np.argsort(-row)[:k] for row, label in zip(logits, labels, strict=True)]
    np.testing.assert_array_equal(in_top(jnp.asarray(logits), jnp.asarray(labels), k), expected)
    assert 0 < sum(expected) < 50


def test_equal_logits_rank_by_index_so_a_constant_output_is_right_on_one_class() -> None:
    labels = jnp.arange(10)
    constant = jnp.zeros((10, 10))
    np.testing.assert_array_equal(in_top(constant, labels, 1), np.arange(10) < 1)
    np.testing.assert_array_equal(in_top(constant, labels, 5), np.arange(10) < 5)


def test_fewer_classes_than_k_are_all_in_the_top() -> None:
    assert in_top(jnp.array([[0.0, 2.0, 1.0]]), jnp.array([0]), 5).all()


@pytest.mark.parametrize("place", range(3))
def test_with_a_nan_among_the_logits_no_label_is_in_the_top(place: int) -> None:
    logits = jnp.array([[0.0, 1.0, 2.0]]).at[0, place].set(jnp.nan)
    assert not in_top(jnp.repeat(logits, 3, axis=0), jnp.arange(3), 3).any()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_of_several_labels_any_in_the_top_is_right(k: int) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((50, 8)), rng.random((50, 8)) < 0.3
    labels[:, 0] |= ~labels.any(1)
    expected = [right[np.argsort(-row)[:k]].any() for row, right in zip(logits, labels, strict=True)]
    found = in_top(jnp.asarray(logits), best_label(jnp.asarray(logits), jnp.asarray(labels)), k)
    np.testing.assert_array_equal(found, expected)
    assert 0 < sum(expected) < 50 or k == 5


def test_sums_count_the_real_rows_only() -> None:
    logits = jnp.array([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [jnp.nan] * 6])
    labels, mask = jnp.array([0, 2, 5, 0]), jnp.array([True, True, True, False])
    loss = jnp.array([1.0, 2.0, 4.0, jnp.nan])
    sums = classification_sums(loss, logits, labels, mask)
    assert {name: float(value) for name, value in sums.items()} == {"loss": 7, "top1": 1, "top5": 2, "examples": 3}
    assert {value.dtype for value in sums.values()} == {jnp.dtype(jnp.float32)}
    dropped = classification_sums(loss, logits, labels, mask.at[0].set(False))
    assert {name: float(value) for name, value in dropped.items()} == {"loss": 6, "top1": 0, "top5": 1, "examples": 2}


def test_a_mean_collector_divides_sums_by_examples_and_leaves_their_number_out() -> None:
    collector = MeanCollector()
    for sums in ({"loss": 4.0, "top1": 1.0, "examples": 1.0}, {"loss": 2.0, "top1": 2.0, "examples": 3.0}):
        collector.add(sums, {})
    assert collector.result() == {"loss": 1.5, "top1": 0.75}


def test_a_mean_collector_is_exact_beyond_what_float32_can_count() -> None:
    collector = MeanCollector()
    for value in (2.0**24, 1.0):
        collector.add({"a": jnp.asarray(value), "examples": jnp.asarray(0.5)}, {})
    assert collector.result() == {"a": 2.0**24 + 1.0}


def test_the_mean_over_no_examples_is_undefined() -> None:
    collector = MeanCollector()
    collector.add({"loss": 0.0, "examples": 0.0}, {})
    assert collector.result() == {"loss": None}
