"""Whole detectors against mmdetection's and torchvision's, from the names of their states to boxes and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.convert import detectors
from halvit_jax.detection.boxes import rescale
from halvit_jax.detection.mask_rcnn import MaskRCNN
from halvit_jax.detection.paste import paste, paste_torchvision
from halvit_jax.detection.retinanet import RetinaNet
from halvit_jax.models import create_model
from halvit_jax.trees import flatten, unflatten

TEST = {
    "test_candidates": 150,
    "test_proposals": 80,
    "rpn_nms": 0.7,
    "score_threshold": 0.05,
    "box_nms": 0.5,
    "detections": 25,
}
SMALL = {"num_classes": 6, "width": 48, "hidden": 128}
ALL_SAMPLES = {
    "train_candidates": 100,
    "train_proposals": 60,
    "rpn_samples": 10_000,
    "rpn_positives": 1.0,
    "roi_samples": 64,
    "roi_positives": 1.0,
}


def _variables(info: Any, reference_weights: Any, model: Any) -> tuple[Any, dict[str, str]]:
    """Our variables by the package's converter, and {their name: our path below `params`}."""
    state = {name: reference_weights.weights(name, tuple(shape)) for name, shape in info["state"].items()}
    wanted = detectors.shapes_of(model)
    variables = unflatten(detectors.from_torch_arrays("resnet18", model, state, wanted))
    rules = detectors.rules("resnet18", model, detectors.library_of(state), wanted)
    found = {name: rule.path(name) for name in state for rule in reversed(rules) if rule.path(name) in wanted}
    return variables, {name: path.removeprefix("params/") for name, path in found.items()}


def _images(reference_weights: Any, n: int, canvas: list[int]) -> jax.Array:
    """Not zero in the padding, which the detector must do."""
    return jnp.asarray(reference_weights.image(n, *canvas).transpose(0, 2, 3, 1))


def _truth(arrays: Any, info: Any, rows: int = 5, masks: bool = True) -> dict[str, jax.Array]:
    """Two images' boxes among padding rows, with bitmaps of the whole canvas."""
    height, width = info["canvas"]
    truth = {
        "size": np.asarray(info.get("image_shapes", [info["canvas"]] * 2)),
        "boxes": np.zeros((2, rows, 4), np.float32),
        "label": np.zeros((2, rows), np.int32),
        "real": np.zeros((2, rows), bool),
        "crops": np.zeros((2, rows, height, width), np.float32),
        "regions": np.tile(np.asarray([0, 0, width, height], np.float32), (2, rows, 1)),
    }
    for i in range(2):
        g = len(arrays[f"gt_boxes{i}"])
        truth["boxes"][i, :g], truth["label"][i, :g], truth["real"][i, :g] = (
            arrays[f"gt_boxes{i}"],
            arrays[f"gt_labels{i}"],
            True,
        )
        if masks:
            truth["crops"][i, :g] = np.unpackbits(arrays[f"gt_bits{i}"]).reshape(g, height, width)
    return jax.tree.map(jnp.asarray, truth)


def _losses_and_gradients(model: Any, variables: Any, images: Any, truth: Any) -> tuple[dict[str, float], Any]:
    def total(params: Any) -> tuple[jax.Array, Any]:
        made = model.apply(variables | {"params": params}, images, truth, None, method="losses")
        return sum(made.losses.values()), made

    gradients, made = jax.jit(jax.grad(total, has_aux=True))(variables["params"])
    return made, flatten(gradients)


def _check_norms(expected: dict[str, float], paths: dict[str, str], gradients: dict[str, Any]) -> float:
    worst = max(
        abs(np.linalg.norm(gradients[paths[name]]) / norm - 1) for name, norm in expected.items() if norm > 1e-9
    )
    assert worst <= 1e-3
    return worst


@pytest.mark.slow
def test_golden_detections_of_mask_rcnn(case: Any, reference_weights: Any) -> None:
    info, arrays = case("mask_rcnn_inference")
    images = _images(reference_weights, 2, info["canvas"])
    size = jnp.asarray(info["image_shapes"])
    model = MaskRCNN(create_model("resnet18", num_classes=0), **SMALL, **TEST)
    variables, _ = _variables(info, reference_weights, model)

    def run(variables: Any, images: jax.Array) -> Any:
        maps = model.apply(variables, images, size, train=False, method="features")
        canvas = images.shape[1:3]
        proposals = model.apply(variables, maps, size, canvas, 150, 80, method="proposals")
        return maps, proposals, model.apply(variables, images, size)

    maps, proposals, found = jax.jit(run)(variables, images)
    np.testing.assert_allclose(maps[32], arrays["map3"], atol=1e-4)
    for i, level in enumerate(maps.values()):
        np.testing.assert_allclose(
            [level.mean(), level.std()], [info[f"map{i}"][k] for k in ("mean", "std")], rtol=1e-3
        )
    assert not found["truncated"].any()
    for i in range(2):
        original = info["original_shapes"][i]
        np.testing.assert_allclose(proposals.boxes[i], arrays[f"proposals{i}"], atol=2e-3)
        np.testing.assert_allclose(proposals.scores[i], arrays[f"proposal_scores{i}"], atol=1e-4)
        assert found["valid"][i].all()
        np.testing.assert_array_equal(found["labels"][i], arrays[f"labels{i}"])
        boxes = rescale(found["boxes"][i], size[i], jnp.asarray(original))
        np.testing.assert_allclose(boxes, arrays[f"boxes{i}"], atol=1e-2)
        np.testing.assert_allclose(found["scores"][i], arrays[f"scores{i}"], atol=1e-4)
        np.testing.assert_allclose(found["masks"][i], arrays[f"mask_probabilities{i}"] / 65535, atol=1e-3)
        drawn = paste(np.asarray(found["masks"][i]), np.asarray(boxes), *original)
        bits = np.unpackbits(arrays[f"masks{i}_bits"])[: drawn.size].reshape(drawn.shape)
        assert np.mean(drawn == bits) >= 0.999


@pytest.mark.slow
def test_golden_losses_and_gradients_of_mask_rcnn(case: Any, reference_weights: Any) -> None:
    info, arrays = case("mask_rcnn_training")
    images = _images(reference_weights, 2, info["canvas"])
    model = MaskRCNN(create_model("resnet18", num_classes=0), **SMALL, **ALL_SAMPLES)
    variables, paths = _variables(info, reference_weights, model)
    made, gradients = _losses_and_gradients(model, variables, images, _truth(arrays, info))
    names = {
        "rpn_class": "loss_rpn_cls",
        "rpn_box": "loss_rpn_bbox",
        "class": "loss_cls",
        "box": "loss_bbox",
        "mask": "loss_mask",
    }
    for ours, theirs in names.items():
        np.testing.assert_allclose(made.losses[ours], info["losses"][theirs], rtol=1e-4)
    assert set(gradients) == {path for path in paths.values() if not path.startswith("batch_stats/")}
    _check_norms(info["grad_norm"], paths, gradients)


@pytest.mark.slow
def test_golden_detections_of_torchvisions_mask_rcnn(case: Any, reference_weights: Any) -> None:
    info, arrays = case("torchvision_mask_rcnn")
    images = _images(reference_weights, 1, info["canvas"])
    model = MaskRCNN(create_model("resnet18", num_classes=0), **SMALL, **TEST, conventions="torchvision")
    variables, _ = _variables(info, reference_weights, model)
    found = jax.jit(model.apply)(variables, images, jnp.asarray([info["canvas"]]))
    assert found["valid"].all()
    np.testing.assert_array_equal(found["labels"][0] + 1, arrays["labels"])
    np.testing.assert_allclose(found["boxes"][0], arrays["boxes"], atol=1e-2)
    np.testing.assert_allclose(found["scores"][0], arrays["scores"], atol=1e-4)
    drawn = paste_torchvision(np.asarray(found["masks"][0]), np.asarray(found["boxes"][0]), *info["canvas"])
    bits = np.unpackbits(arrays["masks_bits"]).reshape(drawn.shape)
    assert np.mean(drawn == bits) >= 0.999


@pytest.mark.slow
def test_golden_losses_and_gradients_of_torchvisions_mask_rcnn(case: Any, reference_weights: Any) -> None:
    info, arrays = case("torchvision_mask_rcnn")
    model = MaskRCNN(create_model("resnet18", num_classes=0), **SMALL, **ALL_SAMPLES, conventions="torchvision")
    variables, paths = _variables(info, reference_weights, model)
    info = info["training"]
    images = _images(reference_weights, 2, info["canvas"])
    truth = _truth(arrays, info)
    truth["label"] -= truth["real"].astype(jnp.int32)  # number 0 is their background
    made, gradients = _losses_and_gradients(model, variables, images, truth)
    names = {
        "rpn_class": "loss_objectness",
        "rpn_box": "loss_rpn_box_reg",
        "class": "loss_classifier",
        "box": "loss_box_reg",
        "mask": "loss_mask",
    }
    for ours, theirs in names.items():
        np.testing.assert_allclose(made.losses[ours], info["losses"][theirs], rtol=1e-4)
    _check_norms(info["grad_norm"], paths, gradients)


@pytest.mark.slow
def test_golden_retinanet(case: Any, reference_weights: Any) -> None:
    info, arrays = case("retinanet")
    images = _images(reference_weights, 2, info["canvas"])
    model = RetinaNet(
        create_model("resnet18", num_classes=0),
        num_classes=6,
        width=48,
        head_depth=2,
        test_candidates=100,
        detections=25,
    )
    variables, paths = _variables(info, reference_weights, model)
    truth = _truth(arrays, info, masks=False)
    made, gradients = _losses_and_gradients(model, variables, images, truth)
    for ours, theirs in {"class": "loss_cls", "box": "loss_bbox"}.items():
        np.testing.assert_allclose(made.losses[ours], info["losses"][theirs], rtol=1e-4)
    assert set(gradients) == {path for path in paths.values() if not path.startswith("batch_stats/")}
    _check_norms(info["grad_norm"], paths, gradients)
    found = jax.jit(model.apply)(variables, images, truth["size"])
    for i in range(2):
        np.testing.assert_array_equal(found["labels"][i], arrays[f"labels{i}"])
        np.testing.assert_allclose(found["boxes"][i], arrays[f"boxes{i}"], atol=1e-2)
        np.testing.assert_allclose(found["scores"][i], arrays[f"scores{i}"], atol=1e-4)
