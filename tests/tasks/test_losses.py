import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.tasks.losses import (
    LOSSES,
    any_label_cross_entropy,
    binary_cross_entropy,
    cross_entropy,
    smooth_one_hot,
)

B, C = 4, 7


def _logits_and_targets() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return 3 * rng.standard_normal((B, C)), rng.dirichlet(np.ones(C), B)


def test_cross_entropy_is_its_formula() -> None:
    logits, targets = _logits_and_targets()
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -(targets * np.log(probabilities)).sum(1)
    np.testing.assert_allclose(cross_entropy(jnp.asarray(logits), jnp.asarray(targets)), expected, rtol=1e-5)


def test_cross_entropy_with_any_of_several_labels_is_that_of_their_summed_probability() -> None:
    logits, _ = _logits_and_targets()
    labels = np.arange(C) % 2 == np.arange(B)[:, None] % 2
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log((probabilities * labels).sum(1))
    np.testing.assert_allclose(any_label_cross_entropy(jnp.asarray(logits), jnp.asarray(labels)), expected, rtol=1e-5)
    one = any_label_cross_entropy(jnp.asarray(logits), jnp.eye(C)[:B] > 0)
    np.testing.assert_allclose(one, cross_entropy(jnp.asarray(logits), jnp.eye(C)[:B]), rtol=1e-6)


def test_binary_cross_entropy_is_its_formula_averaged_over_the_classes() -> None:
    logits, targets = _logits_and_targets()
    probabilities = 1 / (1 + np.exp(-logits))
    expected = -(targets * np.log(probabilities) + (1 - targets) * np.log(1 - probabilities)).mean(1)
    np.testing.assert_allclose(binary_cross_entropy(jnp.asarray(logits), jnp.asarray(targets)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_huge_logits_give_finite_losses_and_gradients(name: str) -> None:
    logits = jnp.array([[1e4, -1e4, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: LOSSES[name](x, jnp.array([[0.0, 1.0, 0.0]])).sum())(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_the_truth_is_least(name: str) -> None:
    targets = jnp.array([[0.2, 0.5, 0.3]])
    truth = jnp.log(targets) if name == "cross_entropy" else jnp.log(targets / (1 - targets))
    np.testing.assert_allclose(jax.grad(lambda x: LOSSES[name](x, targets).sum())(truth), 0.0, atol=1e-6)


def test_smooth_one_hot_spreads_its_share_over_all_classes() -> None:
    labels = jnp.array([2, 0])
    np.testing.assert_array_equal(smooth_one_hot(labels, 4, 0.0), np.eye(4)[[2, 0]])
    expected = [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]
    np.testing.assert_allclose(smooth_one_hot(labels, 4, 0.1), expected, rtol=1e-6)
    np.testing.assert_allclose(smooth_one_hot(labels, 4, 1.0), 0.25, rtol=1e-6)
