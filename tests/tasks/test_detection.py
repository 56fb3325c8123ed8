"""Detection as a task: losses and detections of a small detector, what it reads, and what it refuses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.config import default_config
from halvit_jax.experiment import build
from halvit_jax.experiment.tasks import build_task, model_name
from halvit_jax.protocols import DatasetInfo
from halvit_jax.tasks.detection import Detection
from halvit_jax.training.sharding import make_mesh, to_devices
from halvit_jax.training.state import init_state
from halvit_jax.trees import first_match, flatten

SIDE, CLASSES, G = 64, 3, 4
SMALL = {"num_classes": CLASSES, "width": 16, "test_candidates": 40, "detections": 5, "score_threshold": 0.001}
KINDS: dict[str, dict[str, Any]] = {
    "mask_rcnn": {
        "hidden": 24,
        "mask_depth": 1,
        "train_candidates": 40,
        "train_proposals": 30,
        "test_proposals": 20,
        "rpn_samples": 32,
        "roi_samples": 16,
    },
    "retinanet": {"head_depth": 1, "neck": "plain4"},  # from stride 8 on, for a plain backbone
}
BACKBONES: dict[str, dict[str, Any]] = {
    "halvit_tiny": {"width": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": SIDE},
    "resnet18": {"depths": (1, 1, 1, 1)},
}


def _config(kind: str = "mask_rcnn", backbone: str = "halvit_tiny", **changes: Any) -> Any:
    config = default_config()
    config.task.name, config.total_steps = "detection", 4
    config.model.update({"name": backbone, "num_classes": 0, **BACKBONES[backbone]})
    config.instances.update(canvases=((SIDE, SIDE), (SIDE, 96)), max_objects=G, masks=kind == "mask_rcnn")
    config.detection.update({"detector": kind, **SMALL, **KINDS[kind]})
    config.update_from_flattened_dict(changes)
    return config


def _batch(task: Detection, b: int = 2) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 10, (b, G, 2))
    batch = {
        "image": rng.integers(0, 256, (b, SIDE, SIDE, 3), np.uint8),
        "size": np.full((b, 2), SIDE, np.int32),
        "original": np.full((b, 2), 2 * SIDE, np.int32),
        "image_id": np.arange(b, dtype=np.int32),
        "boxes": np.concatenate([corner, corner + rng.uniform(20, 30, corner.shape)], -1).astype(np.float32),
        "label": rng.integers(0, CLASSES, (b, G), np.int32),
        "real": np.arange(G) < np.array([[2], [3]] * (b // 2)),
        "crops": rng.integers(0, 2, (b, G, 112, 112)).astype(np.uint8) * 255,
        "mask": np.ones(b, bool),
    }
    return {name: jnp.asarray(batch[name]) for name in task.batch_spec()}


@functools.cache
def _trainable(kind: str) -> tuple[Detection, Any, Any, Any]:
    """A task, its variables and its compiled loss with the gradient."""
    task = build_task(_config(kind))
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.asarray(0.05 * rng.standard_normal(s.shape), jnp.float32), shapes)

    def loss(params: Any, batch: Any, key: Any) -> Any:
        made = task.loss(params, {}, {}, batch, key)
        return made.value, made

    return task, params, jax.jit(jax.grad(loss, has_aux=True)), jax.jit(task.score)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask_rcnn", pytest.param("retinanet", marks=pytest.mark.slow)])
def test_the_loss_is_the_sum_of_losses_that_are_reported_apart(kind: str) -> None:
    task, params, run, _ = _trainable(kind)
    gradient, made = run(params, _batch(task), jax.random.key(0))
    names = ["class_loss", "box_loss"] + ["rpn_class_loss", "rpn_box_loss", "mask_loss"] * (kind == "mask_rcnn")
    assert made.sums["examples"] == 2
    np.testing.assert_allclose(sum(made.sums[name] for name in names) / 2, made.value, rtol=1e-5)
    np.testing.assert_allclose(made.sums["loss"] / 2, made.value, rtol=1e-6)
    shares = set(task.units) & set(made.sums)
    assert shares == ({"rpn_positives", "roi_positives", "proposal_recall"} if kind == "mask_rcnn" else {"positives"})
    for path, leaf in flatten(gradient).items():
        assert np.isfinite(leaf).all(), path


def test_samples_follow_the_key_and_rows_that_fill_a_batch_count_nothing() -> None:
    task, params, run, _ = _trainable("mask_rcnn")
    batch = _batch(task)
    _, first = run(params, batch, jax.random.key(0))
    _, again = run(params, batch, jax.random.key(0))
    _, other = run(params, batch, jax.random.key(1))
    assert first.value == again.value != other.value
    filled = batch | {"mask": jnp.asarray([True, False])}
    _, made = run(params, filled, jax.random.key(0))
    _, changed = run(params, filled | {"image": batch["image"].at[1].set(0)}, jax.random.key(0))
    assert made.sums["examples"] == 1
    np.testing.assert_allclose(made.value, changed.value, rtol=1e-6)


@pytest.mark.parametrize("kind", ["mask_rcnn", pytest.param("retinanet", marks=pytest.mark.slow)])
def test_scores_are_detections_on_the_canvas_and_served_alike(kind: str) -> None:
    task, params, _, score = _trainable(kind)
    batch = _batch(task)
    found = score(params, {}, batch)
    assert found["boxes"].shape == (2, 5, 4)
    assert ("masks" in found) == (kind == "mask_rcnn")
    assert found["valid"].any()
    assert float(found["boxes"].max()) <= SIDE
    serving = task.serving({"params": params})
    served = jax.jit(serving.apply)(serving.variables, *(batch[name] for name in serving.inputs))
    np.testing.assert_allclose(served["scores"], found["scores"], rtol=1e-5)
    decoded = task.decode(served, DatasetInfo(["a", "b", "c"], 1))
    assert [len(row["detections"]) for row in decoded] == found["valid"].sum(1).tolist()
    best = decoded[0]["detections"][0]
    assert best["class"] == "abc"[int(found["labels"][0, 0])]
    assert best["score"] == pytest.approx(float(found["scores"][0, 0]), rel=1e-5)


@pytest.mark.slow
def test_bfloat16_is_close_and_losses_and_parameters_stay_float32() -> None:
    _, params, run, _ = _trainable("mask_rcnn")
    task = build_task(_config(compute_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))} == {
        jnp.dtype("float32")
    }
    gradient, exact = run(params, _batch(task), jax.random.key(0))

    def loss(params: Any) -> Any:
        made = task.loss(params, {}, {}, _batch(task), jax.random.key(0))
        return made.value, made

    rough_gradient, rough = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert rough.value.dtype == jnp.float32
    for name in ("rpn_class_loss", "class_loss", "mask_loss"):
        assert float(rough.sums[name]) == pytest.approx(float(exact.sums[name]), rel=0.05), name
    assert rough.value != exact.value
    for path, leaf in flatten(rough_gradient).items():
        assert leaf.dtype == jnp.float32, path
        assert np.isfinite(leaf).all(), path
    norms = [
        np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(each))) for each in (gradient, rough_gradient)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.2)
    boxes = jax.jit(task.score)(params, {}, _batch(task))["boxes"]
    assert boxes.dtype == jnp.float32


@pytest.mark.slow
def test_remat_changes_nothing_but_memory() -> None:
    _, params, run, _ = _trainable("mask_rcnn")
    task = build_task(_config(**{"model.remat": True}))
    gradient, plain = run(params, _batch(task), jax.random.key(0))
    text = str(jax.make_jaxpr(lambda params: task.loss(params, {}, {}, _batch(task), jax.random.key(0)).value)(params))
    assert "checkpoint" in text or "remat" in text
    again = jax.jit(jax.value_and_grad(lambda params: task.loss(params, {}, {}, _batch(task), jax.random.key(0)).value))
    value, found = again(params)
    np.testing.assert_allclose(value, plain.value, rtol=1e-6)
    for path, leaf in flatten(gradient).items():
        np.testing.assert_allclose(flatten(found)[path], leaf, rtol=1e-3, atol=1e-5 * float(jnp.abs(leaf).max()))


@pytest.mark.slow
def test_an_accumulated_step_averages_its_parts_and_the_averages_follow() -> None:
    """Each part divides by its own samples, so the step is the mean of its parts, not the step of the whole batch."""
    config = _config(**{"loop.ema_decay": 0.75, "loop.accumulate": 2, "batch_size": 4, "optim.weight_decay": 0.0})
    config.update_from_flattened_dict(
        {"optim.name": "sgd", "optim.momentum": 0.0, "optim.learning_rate": 0.5, "optim.schedule": "constant"}
        | {"optim.warmup_epochs": 0.0, "optim.scaling": "none", "optim.clip_norm": 0.0}
    )
    _, params, run, _ = _trainable("mask_rcnn")
    task, mesh = build_task(config), make_mesh(devices=jax.devices()[:1])
    optimizer = build.build_optimizer(config, steps_per_epoch=1)
    task.init = lambda key: (jax.tree.map(jnp.copy, params), {})
    abstract = build.build_abstract_state(config, task, optimizer, mesh)
    state = init_state(task, optimizer, abstract, seed=0, use_ema=True, guard=build.make_guard(**config.skip_updates))
    before = jax.device_get(params)
    batch = to_devices(jax.device_get(_batch(task, 4)), mesh)
    new, outcome = build.build_train_step(config, task, optimizer)(state, {}, batch)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), 0)
    parts = [
        run(params, {name: rows[number::2] for name, rows in _batch(task, 4).items()}, jax.random.fold_in(key, number))
        for number in range(2)
    ]
    assert float(outcome.sums["examples"]) == 4
    assert float(outcome.sums["loss"]) == pytest.approx(2 * sum(float(made.value) for _, made in parts), rel=1e-5)
    for path, leaf in flatten(before).items():
        mean = (flatten(parts[0][0])[path] + flatten(parts[1][0])[path]) / 2
        scale = 1e-4 * float(jnp.abs(mean).max()) + 1e-7
        np.testing.assert_allclose(flatten(new.params)[path], leaf - 0.5 * mean, atol=scale, err_msg=path)
        averaged = 0.75 * leaf + 0.25 * flatten(new.params)[path]
        np.testing.assert_allclose(flatten(new.ema["params"])[path], averaged, atol=1e-6, err_msg=path)


def test_a_batch_has_crops_only_where_masks_are_learned() -> None:
    spec = build_task(_config()).batch_spec()
    assert spec["crops"].shape == (G, 112, 112)
    assert spec["image"].shape == (SIDE, SIDE, 3)
    assert "crops" not in build_task(_config("retinanet")).batch_spec()


def test_the_metric_that_chooses_is_that_of_masks_if_there_are_any() -> None:
    assert build_task(_config()).primary_metric == "mask_ap"
    assert build_task(_config("retinanet")).primary_metric == "box_ap"
    assert build_task(_config(**{"detection.masks": False, "instances.masks": False})).primary_metric == "box_ap"


def test_pictures_show_the_objects() -> None:
    task = build_task(_config())
    batch = _batch(task)
    pictures = jax.jit(task.summary_images)(batch)["train_images"]
    assert pictures.shape == (2, SIDE, SIDE, 3)
    plain = jax.jit(task.summary_images)(batch | {"real": jnp.zeros_like(batch["real"])})["train_images"]
    np.testing.assert_allclose(plain, np.asarray(batch["image"]) / 255.0, atol=1e-6)
    assert np.abs(pictures - plain).max() > 0.1


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_has_a_partition_rule(backbone: str) -> None:
    task = build_task(_config(backbone=backbone))
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    axes = {path: first_match(path, task.partition_rules) for path in flatten(params)}
    assert axes["box_head/fc1/kernel"] == (None, ("tensor", "fsdp"))
    assert axes["pyramid/output8/kernel"] == (None, None, None, "fsdp")
    assert axes["box_head/fc1/bias"] == ()


def test_weights_of_a_classifier_fill_the_backbone_and_list_the_rest() -> None:
    rules = build_task(_config()).transfer_rules
    kinds = {
        "box_head/fc1/kernel": "head",
        "backbone/class_token": "head",
        "backbone/head/kernel": "head",
        "backbone/position/embedding": "position_grid",
    }
    assert {path: first_match(path, rules) for path in kinds} == kinds


def test_names_of_detectors_begin_with_their_kind() -> None:
    assert model_name(_config()) == "mask_rcnn_halvit_tiny"
    assert model_name(default_config()) == "halvit_tiny"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_classes": 5}, r"model\.num_classes=5 must be 0 for task\.name='detection'"),
        ({"model.in_channels": 1}, r"model\.in_channels=1 must be 3 for task\.name='detection'"),
        (
            {"instances.canvases": ((64, 64), (70, 96))},
            r"instances\.canvases=\(\(64, 64\), \(70, 96\)\): the strides of VisionTransformer do not divide 70 x 96; "
            r"make the sides multiples of 32, here 96 x 96",
        ),
        (
            {"instances.canvases": ((96, 64),), "model.patch_size": 12, "model.image_size": 96},
            "do not divide 96 x 64; make the sides multiples of 96, here 96 x 96",
        ),
        ({"instances.masks": False}, r"instances\.masks=False leaves nothing .* detection\.masks=False"),
        ({"teacher.init_from": "x"}, r"teacher\.init_from=x needs task\.name='distillation', not 'detection'"),
    ],
)
def test_what_does_not_fit_is_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task(_config(**changes))


def test_a_data_set_of_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"detection\.num_classes=3, but instances\.name='mine' has 2 classes; set"):
        build_task(_config()).check_dataset(DatasetInfo(["a", "b"], 9, "mine"))
