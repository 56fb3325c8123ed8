"""Distillation as a task: what the student's loss is made of, and what is refused."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.tiers import tiered

from halvit_jax.config import default_config
from halvit_jax.models import create_model
from halvit_jax.protocols import Loss
from halvit_jax.tasks.distillation import Distillation, Teacher
from halvit_jax.tasks.losses import cross_entropy, soft_distillation
from halvit_jax.tasks.minivit_losses import hidden_relation, layers_of, qkv_relation
from halvit_jax.trees import flatten

B, SIZE, CLASSES = 6, 8, 7
VIT = {"width": 16, "depth": 2, "num_heads": 2, "image_size": SIZE, "patch_size": 4, "num_classes": CLASSES}
REGNET = {"depths": (1,), "widths": (8,), "group_width": 4, "image_size": SIZE, "num_classes": CLASSES}
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)  # the teacher's
KEY = jax.random.key(5)
SOFT = {"kind": "soft", "alpha": 0.5}
PAIRS = {"qkv_weight": 2.0, "hidden_weight": 0.5, "student_layers": (0, 1), "teacher_layers": (2, 0)}


def _variables(model: nn.Module, seed: int) -> Any:
    images = jnp.zeros((1, SIZE, SIZE, 3))
    shapes = jax.eval_shape(lambda: model.init(KEY, images, train=False))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.abs(0.3 * rng.standard_normal(x.shape)).astype(np.float32) + 0.01, shapes)


def _teacher(name: str = "deit_tiny", **fields: Any) -> Teacher:
    model = create_model(name, **(REGNET if name.startswith("regnet") else VIT | {"width": 24}) | fields)
    return Teacher(model, _variables(model, 7), MEAN, STD)


def _task(name: str = "deit_tiny_distilled", teacher: Teacher | None = None, **changes: Any) -> Distillation:
    config = default_config()
    images = {"mean": config.task.mean, "std": config.task.std}
    fields = images | config.classification.to_dict() | config.distillation.to_dict()
    student = changes.pop("model", None) or create_model(name, **VIT)
    return Distillation(student, teacher=teacher or _teacher(), **fields | changes)


def _batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (B, SIZE, SIZE, 3), np.uint8)),
        "label": jnp.asarray(rng.integers(0, CLASSES, B, np.int32)),
        "mask": jnp.ones(B, bool).at[1].set(False),
    }


def _params(task: Distillation) -> Any:
    return _variables(task.model, 1)["params"]


def _loss(task: Distillation, key: jax.Array = KEY) -> Loss:
    step = jax.jit(lambda params, frozen, batch: task.loss(params, {}, frozen, batch, key))
    return step(_params(task), task.constants, _batch())


def _answers(task: Distillation, images: Any = None, **keywords: Any) -> tuple[Any, Any]:
    """What student and teacher make of the batch, or of images as the student sees them, without help of the task."""
    config = default_config().task
    if images is None:
        images = (np.asarray(_batch()["image"]) / np.float32(255) - np.float32(config.mean)) / np.float32(config.std)
    pixels = images * np.float32(config.std) + np.float32(config.mean)
    mutable = keywords.get("mutable", False)
    student = jax.jit(lambda p, x: task.model.apply({"params": p}, x, train=False, **keywords))
    teacher = jax.jit(lambda v, x: task.teacher.apply(v, x, train=False, mutable=mutable))
    return student(_params(task), images), teacher(task.constants, (pixels - np.float32(MEAN)) / np.float32(STD))


def _mean(rows: Any) -> float:
    return float(np.asarray(rows)[np.asarray(_batch()["mask"])].mean())


@pytest.mark.parametrize("teacher", tiered(["deit_tiny", "regnety_002"], {"deit_tiny"}))
def test_hard_labels_go_to_the_head_of_their_own(teacher: str) -> None:
    task = _task(teacher=_teacher(teacher), alpha=0.3)
    heads, teacher_logits = _answers(task, method="head_logits")
    label = cross_entropy(heads["class"], jax.nn.one_hot(_batch()["label"], CLASSES))
    distill = cross_entropy(heads["distill"], jax.nn.one_hot(teacher_logits.argmax(-1), CLASSES))
    loss = _loss(task)
    assert float(loss.value) == pytest.approx(_mean(0.7 * label + 0.3 * distill), rel=1e-4)
    assert float(loss.sums["loss_label"]) == pytest.approx(5 * _mean(label), rel=1e-4)
    assert float(loss.sums["loss_distill"]) == pytest.approx(5 * _mean(distill), rel=1e-4)
    assert float(loss.sums["examples"]) == 5
    right = np.asarray((heads["class"] + heads["distill"]).argmax(-1) == _batch()["label"])
    assert float(loss.sums["top1"]) == right[np.asarray(_batch()["mask"])].sum()


def test_soft_labels_go_to_the_one_head_there_is() -> None:
    task = _task("halvit_tiny", **SOFT, tau=2.0)
    logits, teacher_logits = _answers(task)
    label = cross_entropy(logits, jax.nn.one_hot(_batch()["label"], CLASSES))
    expected = 0.5 * label + 0.5 * soft_distillation(logits, teacher_logits, 2.0)
    assert float(_loss(task).value) == pytest.approx(_mean(expected), rel=1e-4)


@pytest.mark.slow
def test_relations_are_averaged_over_pairs_of_layers_and_weighted() -> None:
    task = _task("halvit_tiny", _teacher(depth=3), **SOFT, **PAIRS)
    (_, own), (_, theirs) = _answers(task, mutable=["intermediates"])
    expected = {}
    for name, relation in (("query_key_value", qkv_relation), ("hidden", hidden_relation)):
        student, teacher = (layers_of(state["intermediates"], name) for state in (own, theirs))
        expected[name] = _mean((relation(student[0], teacher[2]) + relation(student[1], teacher[0])) / 2)
    loss = _loss(task)
    assert float(loss.sums["loss_qkv"]) == pytest.approx(5 * expected["query_key_value"], rel=1e-4)
    assert float(loss.sums["loss_hidden"]) == pytest.approx(5 * expected["hidden"], rel=1e-4)
    without = _loss(_task("halvit_tiny", _teacher(depth=3), **SOFT))
    added = 2.0 * expected["query_key_value"] + 0.5 * expected["hidden"]
    assert float(loss.value) - float(without.value) == pytest.approx(added, rel=1e-3)
    assert loss.model_state == {}


@pytest.mark.slow
def test_both_see_the_same_images_mixed_and_erased_each_normalised_its_own_way() -> None:
    task = _task(mixup=0.8, cutmix=1.0, erase=1.0)
    images, targets = jax.jit(task._training_inputs)(_batch(), jax.random.split(KEY)[1])
    heads, teacher_logits = _answers(task, images, method="head_logits")
    label = cross_entropy(heads["class"], targets)
    distill = cross_entropy(heads["distill"], jax.nn.one_hot(teacher_logits.argmax(-1), CLASSES))
    assert float(_loss(task).value) == pytest.approx(_mean(0.5 * label + 0.5 * distill), rel=1e-4)
    assert float(_loss(_task()).value) != pytest.approx(_mean(0.5 * label + 0.5 * distill), rel=1e-2)


def test_the_teacher_neither_drops_nor_learns_nor_moves_its_statistics() -> None:
    calm, wild = (_teacher("regnety_002", drop_path=rate) for rate in (0.0, 0.9))
    values = [float(_loss(_task(teacher=teacher)).value) for teacher in (calm, wild)]
    assert values[0] == values[1]
    task = _task(teacher=wild)
    before = jax.tree.map(np.copy, task.constants)
    run = jax.value_and_grad(lambda params: task.loss(params, {}, task.constants, _batch(), KEY).value)
    _, grads = jax.jit(run)(_params(task))
    assert flatten(grads).keys() == flatten(_params(task)).keys()
    jax.tree.map(np.testing.assert_array_equal, task.constants, before)


def test_a_student_with_statistics_has_them_back_and_nothing_more() -> None:
    model = create_model("regnety_002", **REGNET)
    task = _task(model=model, **SOFT)
    params, state = jax.eval_shape(lambda: task.init(KEY))
    loss = jax.eval_shape(lambda p, s: task.loss(p, s, task.constants, _batch(), KEY), params, state)
    assert loss.model_state == state
    assert state


@pytest.mark.slow
def test_recomputed_blocks_keep_the_same_for_the_relations() -> None:
    values = []
    for remat in (False, True):
        model = create_model("halvit_tiny", **VIT, remat=remat)
        task = _task(model=model, **SOFT, **PAIRS | {"teacher_layers": (1, 0)})
        run = jax.jit(jax.value_and_grad(lambda p, task=task: task.loss(p, {}, task.constants, _batch(), KEY).value))
        values.append(run(_params(task)))
    assert float(values[0][0]) == pytest.approx(float(values[1][0]), rel=1e-5)
    for path, gradient in flatten(values[0][1]).items():
        np.testing.assert_allclose(flatten(values[1][1])[path], gradient, rtol=1e-3, atol=1e-5, err_msg=path)


def test_only_training_differs_from_classification() -> None:
    task = _task()
    logits = jax.jit(task.predict)(_params(task), {}, {"image": _batch()["image"]})
    heads, _ = _answers(task, method="head_logits")
    np.testing.assert_allclose(logits, (heads["class"] + heads["distill"]) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "teacher", "fields", "message"),
    [
        ("deit_tiny_distilled", {}, {"kind": "firm"}, "distillation.kind='firm' is not one of hard, soft, soft_cross_"),
        ("deit_tiny_distilled", {}, {"alpha": 1.5}, "distillation.alpha=1.5 must lie between 0 and 1"),
        ("deit_tiny_distilled", {}, {"tau": 0.0}, "distillation.tau=0.0 must be above 0"),
        ("deit_tiny_distilled", {}, {"hidden_weight": -1.0}, "distillation.hidden_weight=-1.0 must not be negative"),
        (
            "deit_tiny",
            {},
            SOFT | {"alpha": 0.0},
            "the teacher has no effect; set distillation.alpha",
        ),
        ("deit_tiny_distilled", {}, {"alpha": 1.0}, "distillation.alpha=1.0 leaves the class head untrained"),
        (
            "deit_tiny_distilled",
            {},
            {"alpha": 0.0, "qkv_weight": 1.0},
            "distillation.alpha=0.0 leaves the distillation head untrained",
        ),
        ("deit_tiny", {}, {}, "distillation.kind='hard' needs a student with a second head for the teacher's label"),
        (
            "deit_tiny_distilled",
            {"num_classes": 9},
            {},
            "the teacher has 9 classes, the student model.num_classes=7; give a teacher of the student's classes",
        ),
        (
            "deit_tiny",
            {},
            SOFT | {"qkv_weight": 1.0},
            "distillation.student_layers=() and distillation.teacher_layers=()",
        ),
        (
            "deit_tiny",
            {},
            SOFT | PAIRS | {"teacher_layers": (0,)},
            "distillation.student_layers=(0, 1) and distillation.teacher_layers=(0,) must have the same number",
        ),
        ("deit_tiny", {}, SOFT | PAIRS, "distillation.teacher_layers has [2], but the teacher's are 0 to 1"),
        (
            "deit_tiny",
            {},
            SOFT | PAIRS | {"student_layers": (-1, 5), "teacher_layers": (0, 1)},
            "distillation.student_layers has [-1, 5], but the student's are 0 to 1",
        ),
        (
            "deit_tiny",
            {"name": "regnety_002"},
            SOFT | PAIRS,
            "the teacher sows no query_key_value of its layers; set distillation.qkv_weight",
        ),
        (
            "deit_tiny",
            {"pool": "mean", "depth": 3},
            SOFT | PAIRS,
            "the tokens of layer 0 in distillation.student_layers are (1, 5), those of layer 2 in distillation.tea",
        ),
    ],
)
def test_a_distillation_that_cannot_work_is_refused_by_field(
    name: str, teacher: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _task(name, _teacher(**teacher), **fields)
