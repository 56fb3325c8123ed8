from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.detection.losses import focal, sigmoid_cross_entropy, smooth_l1, softmax_cross_entropy


def test_golden_losses_of_the_rpn_and_their_gradients(case: Any) -> None:
    info, arrays = case("losses")
    code, target = arrays["rpn_code"], arrays["rpn_target"]
    sampled, factor = code >= -1, info["rpn"]["avg_factor"]

    def losses(logits: Any, deltas: Any) -> tuple[jax.Array, jax.Array]:
        classes = sigmoid_cross_entropy(logits, code >= 0, sampled)
        return classes / factor, smooth_l1(deltas, target, code >= 0) / factor

    given = arrays["rpn_logit"], arrays["rpn_delta"]
    found = jax.jit(losses)(*given)
    np.testing.assert_allclose(found, [info["rpn"][name] for name in ("loss_cls", "loss_box")], rtol=1e-5)
    gradients = jax.jit(jax.grad(lambda *given: sum(losses(*given)), argnums=(0, 1)))(*given)
    np.testing.assert_allclose(gradients[0], arrays["rpn_grad_logit"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradients[1], arrays["rpn_grad_delta"], rtol=1e-5, atol=1e-7)
    smooth = smooth_l1(given[1], target, code >= 0, beta=1 / 9) / int(sampled.sum())
    np.testing.assert_allclose(smooth, info["rpn_torchvision"]["loss_box"], rtol=1e-5)


def test_golden_losses_of_the_boxes_and_their_gradients(case: Any) -> None:
    info, arrays = case("losses")
    labels, n = arrays["roi_labels"], info["roi"]["samples"]
    positive = labels < info["roi"]["background"]

    def losses(logits: Any, deltas: Any) -> tuple[jax.Array, jax.Array]:
        own = deltas.reshape(n, -1, 4)[np.arange(n), np.where(positive, labels, 0)]
        classes = softmax_cross_entropy(logits, labels, jnp.ones(n))
        return classes / n, smooth_l1(own, arrays["roi_targets"], positive) / n

    given = arrays["roi_logits"], arrays["roi_deltas"]
    found = jax.jit(losses)(*given)
    np.testing.assert_allclose(found, [info["roi"][name] for name in ("loss_cls", "loss_box")], rtol=1e-5)
    gradients = jax.jit(jax.grad(lambda *given: sum(losses(*given)), argnums=(0, 1)))(*given)
    np.testing.assert_allclose(gradients[0], arrays["roi_grad_logits"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradients[1], arrays["roi_grad_deltas"], rtol=1e-5, atol=1e-7)


def test_golden_loss_of_the_masks_and_its_gradient(case: Any) -> None:
    info, arrays = case("losses")
    n = info["mask"]["n"]
    targets = np.unpackbits(arrays["mask_target_bits"])[: n * 28 * 28].reshape(n, 28, 28)
    own = arrays["mask_logits_own_class"].astype(np.float32)
    mean = jax.value_and_grad(lambda x: sigmoid_cross_entropy(x, targets, jnp.ones(())) / targets.size)
    loss, gradient = jax.jit(mean)(own)
    np.testing.assert_allclose(loss, info["mask"]["loss"], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(gradient), info["mask"]["grad_norm"], rtol=1e-5)


def test_golden_focal_loss_and_its_gradient(case: Any) -> None:
    info, arrays = case("losses")
    labels, weights = arrays["focal_labels"], arrays["focal_weights"]
    loss = jax.value_and_grad(lambda x: focal(x, labels, weights) / info["focal"]["avg_factor"])
    value, gradient = jax.jit(loss)(arrays["focal_logits"])
    np.testing.assert_allclose(value, info["focal"]["loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, arrays["focal_grad"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("size", [40.0, 1e4])
def test_extreme_logits_give_finite_losses_and_gradients(size: float) -> None:
    logits, labels = jnp.asarray([[size, -size], [-size, size]]), jnp.asarray([0, 0])
    for loss in (
        lambda x: sigmoid_cross_entropy(x, jnp.ones_like(x), jnp.ones(())),
        lambda x: softmax_cross_entropy(x, labels, jnp.ones(2)),
        lambda x: focal(x, labels, jnp.ones(2)),
    ):
        value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_losses_of_bfloat16_are_float32() -> None:
    x = jnp.zeros((2, 4), jnp.bfloat16)
    labels, weights = jnp.zeros(2, jnp.int32), jnp.ones(2)
    for loss, target in ((softmax_cross_entropy, labels), (focal, labels), (smooth_l1, x)):
        assert jax.eval_shape(loss, x, target, weights).dtype == jnp.float32
    assert jax.eval_shape(sigmoid_cross_entropy, x, x, x).dtype == jnp.float32
