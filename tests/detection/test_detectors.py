"""Both detectors, untrained and small: what must hold whatever the weights are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from halvit_jax.detection import MaskRCNN, RetinaNet, mask_rcnn
from halvit_jax.layers.conv import ConvNorm
from halvit_jax.trees import flatten

CANVAS, CLASSES, ROWS = (64, 96), 3, 4


class TinyBackbone(nn.Module):
    """A convolution a stage."""

    dtype: str | None = None

    @nn.compact
    def features(self, images: jax.Array, *, train: bool, frozen_norms: bool = False) -> dict[int, jax.Array]:
        maps, x = {}, images.astype(self.dtype)
        for i, stride in enumerate((4, 8, 16, 32)):
            conv = ConvNorm(8 * (i + 1), 3, 4 if i == 0 else 2, dtype=self.dtype, name=f"stage{i}")
            x = maps[stride] = nn.relu(conv(x, train=train and not frozen_norms))
        return maps


SMALL: dict[type, dict[str, Any]] = {
    MaskRCNN: {
        "num_classes": CLASSES,
        "width": 16,
        "hidden": 24,
        "mask_depth": 1,
        "train_candidates": 40,
        "train_proposals": 30,
        "test_candidates": 40,
        "test_proposals": 20,
        "rpn_samples": 32,
        "roi_samples": 16,
        "detections": 10,
        "score_threshold": 0.01,
    },
    RetinaNet: {
        "num_classes": CLASSES,
        "width": 16,
        "head_depth": 1,
        "test_candidates": 40,
        "detections": 10,
        "score_threshold": 0.001,
    },
}
# The golden cases train Mask R-CNN in the default tier.
both = pytest.mark.parametrize("kind", [pytest.param(MaskRCNN, marks=pytest.mark.slow), RetinaNet])


def _model(kind: type, **fields: Any) -> Any:
    return kind(TinyBackbone(fields.get("dtype")), **SMALL[kind] | fields)


def _batch(b: int = 4, canvas: tuple[int, int] = CANVAS) -> tuple[jax.Array, dict[str, jax.Array]]:
    rng = np.random.default_rng(0)
    size = np.stack([rng.integers(40, canvas[0] + 1, b), rng.integers(40, canvas[1] + 1, b)], -1)
    corner = rng.uniform(0, 10, (b, ROWS, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(20, 30, corner.shape)], -1)
    truth = {
        "size": size,
        "boxes": boxes.astype(np.float32),
        "label": rng.integers(0, CLASSES, (b, ROWS)),
        "real": np.arange(ROWS) < rng.integers(1, ROWS + 1, (b, 1)),
        "crops": rng.integers(0, 2, (b, ROWS, 14, 14)).astype(np.uint8) * 255,
        "mask": np.ones(b, bool),
    }
    images = rng.standard_normal((b, *canvas, 3)).astype(np.float32)
    return jnp.asarray(images), jax.tree.map(jnp.asarray, truth)


@functools.cache
def _variables(kind: type) -> Any:
    model = _model(kind)
    return jax.jit(model.init)(jax.random.key(0), *(a[:1] for a in (_batch()[0], _batch()[1]["size"])))


@functools.cache
def _training(kind: type, dtype: str | None = None) -> Any:
    model = _model(kind, dtype=dtype)

    @jax.jit
    def run(variables: Any, images: jax.Array, truth: Any, key: jax.Array) -> Any:
        def total(params: Any) -> tuple[jax.Array, Any]:
            made = model.apply(variables | {"params": params}, images, truth, key, method="losses")
            return sum(made.losses.values()), made

        gradients, made = jax.grad(total, has_aux=True)(variables["params"])
        return made, gradients

    return run


@functools.cache
def _detecting(kind: type) -> Any:
    return jax.jit(_model(kind).apply)


@both
def test_untrained_losses_are_those_of_guessing(kind: type) -> None:
    images, truth = _batch()
    made, _ = _training(kind)(_variables(kind), images, truth, jax.random.key(1))
    if kind is MaskRCNN:
        expected = {"rpn_class": np.log(2), "class": np.log(CLASSES + 1)}
        for name, value in expected.items():
            np.testing.assert_allclose(made.losses[name], value, rtol=0.05)
        np.testing.assert_allclose(made.losses["mask"], np.log(2), rtol=0.5)
        assert set(made.losses) == {"rpn_class", "rpn_box", "class", "box", "mask"}
        assert 0 < made.metrics["roi_positives"] <= 0.25
        assert 0 < made.metrics["rpn_positives"] <= 0.5
        assert 0 <= made.metrics["proposal_recall"] <= 1
    else:
        assert set(made.losses) == {"class", "box"}
        assert 0 < made.metrics["positives"] < 0.1
    assert all(np.isfinite(loss) and loss > 0 for loss in made.losses.values())


@both
def test_every_parameter_gets_a_gradient(kind: type) -> None:
    images, truth = _batch()
    _, gradients = _training(kind)(_variables(kind), images, truth, jax.random.key(1))
    for path, gradient in flatten(gradients).items():
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient), path


@both
def test_images_that_only_fill_a_batch_change_nothing(kind: type) -> None:
    images, truth = _batch()
    filled = truth | {"mask": jnp.asarray([True, True, False, False])}
    key = jax.random.key(1)
    made, gradients = _training(kind)(_variables(kind), images, filled, key)
    empty = jax.tree.map(lambda a: jnp.concatenate([a[:2], jnp.zeros_like(a[2:])]), filled)
    other, others = _training(kind)(_variables(kind), images.at[2:].set(9), empty, key)
    for a, b in zip(jax.tree.leaves((made, gradients)), jax.tree.leaves((other, others)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@both
def test_losses_of_a_filled_batch_are_those_of_its_images(kind: type) -> None:
    images, truth = _batch()
    key, filled = jax.random.key(1), truth | {"mask": jnp.asarray([True, True, False, False])}
    made, _ = _training(kind)(_variables(kind), images, filled, key)
    alone, _ = _training(kind)(_variables(kind), images[:2], jax.tree.map(lambda a: a[:2], truth), key)
    for name, loss in made.losses.items():
        np.testing.assert_allclose(loss, alone.losses[name], rtol=1e-5)


@both
def test_images_without_boxes_train_as_background(kind: type) -> None:
    images, truth = _batch()
    truth["real"] = jnp.zeros_like(truth["real"])
    truth["boxes"] = jnp.zeros_like(truth["boxes"])
    made, gradients = _training(kind)(_variables(kind), images, truth, jax.random.key(1))
    assert made.losses["class"] > 0
    assert made.losses["box"] == made.losses.get("mask", 0) == made.losses.get("rpn_box", 0) == 0
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))


@pytest.mark.slow
@both
def test_detections_of_an_image_do_not_depend_on_its_batch(kind: type) -> None:
    images, truth = _batch()
    together = _detecting(kind)(_variables(kind), images, truth["size"])
    alone = _detecting(kind)(_variables(kind), images[2:3], truth["size"][2:3])
    assert together["valid"].any(1).all()
    for name, values in alone.items():
        np.testing.assert_allclose(values[0], together[name][2], rtol=1e-4, atol=1e-4)
    rows, columns = truth["size"][:, :1], truth["size"][:, 1:]
    x1, y1, x2, y2 = jnp.moveaxis(together["boxes"], -1, 0)
    assert ((x1 >= 0) & (y1 >= 0) & (x2 <= columns) & (y2 <= rows)).all()
    assert not together["scores"][~together["valid"]].any()


@both
def test_pixels_of_the_padding_count_nothing(kind: type) -> None:
    images, _ = _batch()
    size = jnp.asarray([[40, 64]] * 4)
    found = _detecting(kind)(_variables(kind), images, size)
    changed = _detecting(kind)(_variables(kind), images.at[:, 40:].set(7).at[:, :, 64:].set(-7), size)
    for name, values in found.items():
        np.testing.assert_array_equal(values, changed[name])


@pytest.mark.slow
@both
def test_eight_devices_draw_the_same_samples_as_one(kind: type) -> None:
    images, truth = _batch(8)
    key = jax.random.key(3)
    alone, gradients = _training(kind)(_variables(kind), images, truth, key)
    rows = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
    shared, theirs = _training(kind)(_variables(kind), *jax.device_put((images, truth), rows), key)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(shared), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_eight_devices_leave_out_the_masks_that_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    images, truth = _batch(8)
    alone, gradients = _training(MaskRCNN)(_variables(MaskRCNN), images, truth, jax.random.key(3))
    monkeypatch.setattr(mask_rcnn, "LEAST_CUT", 2)
    rows = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
    given = _variables(MaskRCNN), *jax.device_put((images, truth), rows), jax.random.key(3)
    cut = _training.__wrapped__(MaskRCNN)
    assert "cond" in str(jax.make_jaxpr(cut)(*given))
    shared, theirs = cut(*given)
    np.testing.assert_allclose(shared.losses["mask"], alone.losses["mask"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@both
def test_two_canvases_share_their_parameters(kind: type) -> None:
    for canvas in (CANVAS, CANVAS[::-1]):
        images, truth = _batch(2, canvas)
        made, _ = _training(kind)(_variables(kind), images, truth, jax.random.key(1))
        assert all(np.isfinite(loss) for loss in made.losses.values())


@pytest.mark.slow
@both
def test_losses_in_bfloat16_are_near_those_in_float32(kind: type) -> None:
    images, truth = _batch()
    wide, _ = _training(kind)(_variables(kind), images, truth, jax.random.key(1))
    half, gradients = _training(kind, "bfloat16")(_variables(kind), images, truth, jax.random.key(1))
    assert all(loss.dtype == jnp.float32 for loss in half.losses.values())
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))
    for name in ("class", "rpn_class"):
        if name in wide.losses:
            np.testing.assert_allclose(half.losses[name], wide.losses[name], rtol=0.05)


def test_faster_rcnn_has_no_masks() -> None:
    model = _model(MaskRCNN, masks=False)
    images, truth = _batch(1)
    truth.pop("crops")
    found, variables = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, truth["size"]))
    assert "masks" not in found
    assert "mask_head" not in variables["params"]
    losses = jax.eval_shape(lambda v: model.apply(v, images, truth, None, method="losses"), variables).losses
    assert set(losses) == {"rpn_class", "rpn_box", "class", "box"}


@pytest.mark.parametrize(("field", "value"), [("neck", "bifpn"), ("conventions", "yolo"), ("num_classes", 0)])
def test_unknown_choices_are_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"detection\.{field}={value!r}"):
        _model(RetinaNet, **{field: value})


@pytest.mark.slow
def test_no_more_masks_are_drawn_than_the_image_with_the_most_of_them_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, variables, n = _model(MaskRCNN), _variables(MaskRCNN), 36
    rng = np.random.default_rng(0)
    maps = {s: jnp.asarray(rng.standard_normal((2, 64 // s, 64 // s, 16)), jnp.float32) for s in (4, 8, 16, 32)}
    corner = rng.uniform(0, 30, (2, n, 2))
    boxes = jnp.asarray(np.concatenate([corner, corner + 20], -1), jnp.float32)
    labels = jnp.asarray(rng.integers(0, CLASSES, (2, n)))

    def draw(variables: Any, used: jax.Array) -> tuple[jax.Array, Any]:
        def total(variables: Any) -> tuple[jax.Array, jax.Array]:
            drawn = model.apply(variables, maps, boxes, labels, used, method="_draw")
            return jnp.sum(jnp.where(used[..., None, None], drawn, 0) ** 2), drawn

        gradient, drawn = jax.grad(total, has_aux=True)(variables)
        return drawn, gradient

    cut = jax.jit(draw)
    assert "cond" in str(jax.make_jaxpr(draw)(variables, jnp.ones((2, n), bool)))
    monkeypatch.setattr(mask_rcnn, "LEAST_CUT", n + 1)
    whole = jax.jit(lambda *given: draw(*given))
    assert "cond" not in str(jax.make_jaxpr(lambda *given: draw(*given))(variables, jnp.ones((2, n), bool)))
    for needed, drawn in ((0, 9), (9, 9), (10, 18), (18, 18), (19, 36), (36, 36)):
        used = jnp.arange(n)[None] < jnp.asarray([[needed // 2], [needed]])
        (found, gradient), (expected, expected_gradient) = cut(variables, used), whole(variables, used)
        np.testing.assert_allclose(found[:, :drawn], expected[:, :drawn], atol=1e-5)
        assert not found[:, drawn:].any()
        for path, leaf in flatten(expected_gradient).items():
            np.testing.assert_allclose(flatten(gradient)[path], leaf, rtol=1e-4, atol=1e-4 * float(jnp.abs(leaf).max()))
