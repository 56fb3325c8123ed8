import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import classification
from jax.sharding import NamedSharding, PartitionSpec

from halvit_jax.config import default_config
from halvit_jax.layers import conv
from halvit_jax.models import create_model
from halvit_jax.protocols import DatasetInfo, Loss
from halvit_jax.tasks import mixup
from halvit_jax.tasks.classification import Classification
from halvit_jax.training.sharding import make_mesh, to_devices

B, SIZE, CLASSES = 6, 8, 7
TINY = {"width": 16, "depth": 1, "num_heads": 2, "image_size": SIZE, "patch_size": 4, "num_classes": CLASSES}
KEY = jax.random.key(5)


def _task(model: str = "halvit_tiny", fields: dict[str, Any] = TINY, **changes: Any) -> Classification:
    return classification(create_model(model, **fields), **changes)


def _batch(b: int = B) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (b, SIZE, SIZE, 3), np.uint8)),
        "label": jnp.asarray(rng.integers(0, CLASSES, b, np.int32)),
        "mask": jnp.ones(b, bool),
    }


def _params(task: Classification) -> Any:
    shapes, _ = jax.eval_shape(lambda: task.init(KEY))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda shape: rng.standard_normal(shape.shape).astype(np.float32), shapes)


def _loss(task: Classification, batch: dict[str, jax.Array]) -> Loss:
    return jax.jit(lambda params, batch: task.loss(params, {}, {}, batch, KEY))(_params(task), batch)


def _by_hand(task: Classification, batch: dict[str, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and log-probabilities of the normalised images."""
    config = default_config().task
    images = (np.asarray(batch["image"]) / np.float32(255) - np.float32(config.mean)) / np.float32(config.std)
    apply = jax.jit(lambda params, images: task.model.apply({"params": params}, images, train=False))
    logits = np.asarray(apply(_params(task), images))
    return logits, logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_the_model_sees_images_normalised_on_the_scale_of_0_to_1(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(mixup, "random_erase", lambda key, images, **_: seen.update(images=images) or images)
    task = _task(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    batch = _batch() | {"image": jnp.full((B, SIZE, SIZE, 3), 255, jnp.uint8)}
    with jax.disable_jit():
        task.summary_images(batch)
    np.testing.assert_allclose(seen["images"][0, 0, 0], [1.8, 3.2, 5.6], rtol=1e-5)


def test_inference_gives_the_models_logits_of_the_normalised_images() -> None:
    task, batch = _task(), _batch()
    logits = jax.jit(task.predict)(_params(task), {}, {"image": batch["image"]})
    np.testing.assert_allclose(logits, _by_hand(task, batch)[0], atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_the_real_rows_of_the_smoothed_cross_entropy(smoothing: float) -> None:
    task, batch = _task(label_smoothing=smoothing), _batch()
    batch["mask"] = batch["mask"].at[1].set(False)
    loss = _loss(task, batch)
    _, log_p = _by_hand(task, batch)
    own = log_p[np.arange(B), np.asarray(batch["label"])]
    expected = -((1 - smoothing) * own + smoothing * log_p.mean(1))[np.asarray(batch["mask"])]
    assert float(loss.value) == pytest.approx(expected.mean(), rel=1e-4)
    assert float(loss.sums["loss"]) == pytest.approx(expected.sum(), rel=1e-4)
    assert float(loss.sums["examples"]) == B - 1


def test_binary_cross_entropy_is_chosen_by_name() -> None:
    task, batch = _task(loss="binary_cross_entropy"), _batch()
    p = 1 / (1 + np.exp(-_by_hand(task, batch)[0]))
    truth = np.eye(CLASSES)[np.asarray(batch["label"])]
    expected = -(truth * np.log(p) + (1 - truth) * np.log(1 - p)).mean()
    assert float(_loss(task, batch).value) == pytest.approx(expected, rel=1e-4)


def test_a_threshold_makes_binary_targets_of_mixed_ones() -> None:
    """As BCE of "ResNet strikes back": every class with more than the threshold is simply there."""
    fields = {"loss": "binary_cross_entropy", "mixup": 0.8}
    mixed = _targets(_task(**fields))
    assert len(np.unique(mixed)) > 2
    found = _targets(_task(**fields, bce_threshold=0.2))
    np.testing.assert_array_equal(found, mixed > 0.2)
    assert (found.sum(1) >= 1).all()


def _targets(task: Classification) -> np.ndarray:
    """The targets of a training step."""
    return np.asarray(jax.jit(task._training_inputs)(_batch(), jax.random.key(3))[1])


def test_evaluation_scores_plain_cross_entropy_whatever_the_training_loss() -> None:
    task, batch = _task(loss="binary_cross_entropy", label_smoothing=0.3, mixup=0.8), _batch()
    batch["mask"] = batch["mask"].at[0].set(False)
    logits, log_p = _by_hand(task, batch)
    sums = jax.jit(task.score)(_params(task), {}, batch)
    labels, mask = np.asarray(batch["label"]), np.asarray(batch["mask"])
    assert float(sums["loss"]) == pytest.approx(-log_p[np.arange(B), labels][mask].sum(), rel=1e-5)
    assert float(sums["top1"]) == (logits.argmax(1) == labels)[mask].sum()
    assert float(sums["examples"]) == B - 1


def test_a_batch_without_real_rows_has_a_loss_of_zero() -> None:
    task = _task()
    batch = _batch() | {"mask": jnp.zeros(B, bool)}
    assert float(_loss(task, batch).value) == 0.0


def test_training_erases_before_it_mixes_smoothed_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    marked = jnp.full((B, SIZE, SIZE, 3), 7.0)

    def erase(key: jax.Array, images: jax.Array, *, probability: float, fill: str) -> jax.Array:
        calls.append(("erase", probability, fill))
        return marked

    def blend(key: jax.Array, images: jax.Array, targets: jax.Array, **alphas: float) -> tuple[jax.Array, jax.Array]:
        calls.append(("mix", alphas))
        assert images is marked
        np.testing.assert_allclose(targets.max(1), 0.9 + 0.1 / CLASSES, rtol=1e-5)
        return images, targets

    monkeypatch.setattr(mixup, "random_erase", erase)
    monkeypatch.setattr(mixup, "mixup_or_cutmix", blend)
    _task(label_smoothing=0.1, mixup=0.8, cutmix=1.0, mixup_switch=0.4, mixup_mode="elem", erase=0.25).summary_images(
        _batch()
    )
    assert calls == [
        ("erase", 0.25, "noise"),
        ("mix", {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch": 0.4, "per_image": True, "group": 0}),
    ]


def test_groups_of_32_give_the_same_loss_and_statistics_on_any_number_of_devices() -> None:
    """Groups that lie on several devices, on one, or several of them on one; and against the groups one by one."""
    fields = {"depths": (1,), "widths": (8,), "partial_dims": (8,), "stages": ("i",), "stem_strides": (2,)}
    mixing = {"mixup": 0.8, "cutmix": 1.0, "mix_group": 32}
    fields |= {"image_size": SIZE, "num_classes": CLASSES}
    task = _task("shvit_s1", fields, **mixing, norm_group=32)
    params, model_state = jax.jit(task.init)(KEY)
    loss = jax.jit(lambda params, model_state, batch: task.loss(params, model_state, {}, batch, KEY)[:2])
    found = []
    for devices in (1, 2, 4, 8):
        mesh = make_mesh(devices=jax.devices()[:devices])
        everywhere = NamedSharding(mesh, PartitionSpec())
        batch = to_devices({name: np.asarray(rows) for name, rows in _batch(64).items()}, mesh)
        with conv.xla_convolutions():  # quicker to compile
            found.append(jax.device_get(loss(*jax.device_put((params, model_state), everywhere), batch)))
    for other in found[1:]:
        np.testing.assert_allclose(other[0], found[0][0], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other[1], found[0][1])

    # A group is a batch of its own: its loss under its own key of the mixing, and its statistics.
    _, mix_key = jax.random.split(jax.random.split(KEY)[1])

    @jax.jit
    def alone(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        alphas = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch": 0.5}
        targets = jax.nn.one_hot(labels, CLASSES)
        images, targets = mixup.mixup_or_cutmix(key, task.normalise(images), targets, **alphas)
        variables = {"params": params, **model_state}
        logits, state = task.model.apply(variables, images, train=True, mutable=["batch_stats"])
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean(), state

    batch, keys = _batch(64), jax.random.split(mix_key, 2)
    halves = [(batch["image"][rows], batch["label"][rows]) for rows in (slice(32), slice(32, 64))]
    with conv.xla_convolutions():
        parts = [alone(key, *half) for key, half in zip(keys, halves, strict=True)]
    assert np.mean([float(value) for value, _ in parts]) == pytest.approx(float(found[0][0]), rel=1e-5)
    means = jax.tree.map(lambda *leaves: np.mean(leaves, 0), *(state for _, state in parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[0][1], means)


@pytest.mark.parametrize("field", ["mix_group", "norm_group"])
def test_a_group_that_does_not_divide_the_batch_is_refused(field: str) -> None:
    task = _task(mixup=1.0, **{field: 4})
    with pytest.raises(ValueError, match=rf"classification.{field}=4 must divide the 6 rows"):
        jax.eval_shape(lambda: task.loss(_params(task), {}, {}, _batch(), KEY))


def test_the_randomness_of_the_loss_comes_from_its_key() -> None:
    task, batch = _task(fields=TINY | {"depth": 2, "drop_path": 0.5}, erase=0.5), _batch()
    value = jax.jit(lambda params, key: task.loss(params, {}, {}, batch, key).value)
    first, again, other = (float(value(_params(task), jax.random.key(seed))) for seed in (0, 0, 1))
    assert first == again != other


def test_training_returns_a_model_state_of_the_same_structure() -> None:
    for model, fields in (("halvit_tiny", TINY), ("resnet18", {"image_size": 32, "num_classes": CLASSES})):
        task = _task(model, fields)
        batch = _batch() | {"image": jnp.zeros((B, task.model.image_size, task.model.image_size, 3), jnp.uint8)}
        params, model_state = jax.eval_shape(lambda task=task: task.init(KEY))
        loss = jax.eval_shape(lambda p, s, task=task, batch=batch: task.loss(p, s, {}, batch, KEY), params, model_state)
        assert loss.model_state == model_state
        assert bool(model_state) == (model == "resnet18")


def test_summary_images_are_at_most_64_between_0_and_1_and_as_they_came_where_nothing_is_on() -> None:
    batch = _batch(70)
    images = np.asarray(jax.jit(_task().summary_images)(batch)["train_images"])
    np.testing.assert_allclose(images, np.asarray(batch["image"][:64]) / 255, atol=1e-5)
    erased = np.asarray(jax.jit(_task(erase=1.0).summary_images)(batch)["train_images"])
    assert erased.shape == (64, SIZE, SIZE, 3)
    assert erased.min() >= 0.0
    assert erased.max() <= 1.0
    assert np.abs(erased - images).max() > 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "hinge"}, "classification.loss='hinge' is not one of cross_entropy, binary_cross_entropy"),
        ({"label_smoothing": 1.5}, "classification.label_smoothing=1.5 must lie between 0 and 1"),
        ({"mixup_switch": -0.5}, "classification.mixup_switch=-0.5 must lie between 0 and 1"),
        ({"erase": 2.0}, "classification.erase=2.0 must lie between 0 and 1"),
        ({"erase_fill": "grey"}, "classification.erase_fill='grey' is not one of noise, zero"),
        (
            {"loss": "binary_cross_entropy", "bce_threshold": 1.5},
            "classification.bce_threshold=1.5 must lie between 0 and 1",
        ),
        ({"bce_threshold": 0.2}, "classification.bce_threshold=0.2 is for classification.loss='binary_cross_entropy'"),
        ({"mixup": -0.1}, "classification.mixup=-0.1 must not be negative"),
        ({"cutmix": -1.0}, "classification.cutmix=-1.0 must not be negative"),
        ({"mix_group": -1}, "classification.mix_group=-1 must not be negative"),
        ({"norm_group": -1}, "classification.norm_group=-1 must not be negative"),
    ],
)
def test_impossible_fields_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _task(**fields)


def test_class_weights_need_one_number_for_each_class() -> None:
    model = create_model("halvit_tiny", num_classes=3)
    for weights in ((1.0, 2.0), (1.0, 2.0, -1.0)):
        with pytest.raises(ValueError, match=r"class_weights=\(1\.0, 2\.0.*\) must be one number >= 0 for each of"):
            classification(model, class_weights=weights)
    assert classification(model, class_weights=(1.0, 2.0, 0.5)).model is model


def test_a_data_set_of_one_class_is_refused_and_an_unbalanced_one_warned_of() -> None:
    task = classification(create_model("halvit_tiny", num_classes=2))
    with pytest.raises(ValueError, match=r"data\.name='folder' has the one class 'all', so there is nothing to learn"):
        task.check_dataset(DatasetInfo(["all"], 3, "folder"))
    records = [{"label": 0}] * 90 + [{"label": 1}] * 10
    line, warning = task.check_records(records, DatasetInfo(["ant", "bee"], 100))
    assert line == "2 classes of 10 to 90 images"
    assert "data.balance=1 draws them equally often" in warning
    assert "classification.class_weights='(0.556,5)'" in warning
    assert task.check_records(records[80:], DatasetInfo(["ant", "bee"], 20))[1] == ""


def test_images_of_other_channels_are_normalised_one_by_one_and_shown() -> None:
    task = _task(fields=TINY | {"in_channels": 5}, mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(0.5,) * 5)
    assert task.batch_spec()["image"].shape == (SIZE, SIZE, 5)
    batch = _batch() | {"image": jnp.full((B, SIZE, SIZE, 5), 255, jnp.uint8)}
    np.testing.assert_allclose(task.normalise(batch["image"])[0, 0, 0], [1.8, 1.6, 1.4, 1.2, 1.0], rtol=1e-5)
    assert task.summary_images(batch)["train_images"].shape == (B, SIZE, SIZE, 3)
    with pytest.raises(ValueError, match=r"task.mean=\(0.5,\) has 1 values, but model.in_channels=3; give"):
        _task(mean=(0.5,))
    with pytest.raises(ValueError, match=r"task.std=\(0.5, 0.5, 0.5\) has 3 values, but model.in_channels=1; give one"):
        _task(fields=TINY | {"in_channels": 1}, mean=(0.5,), std=(0.5, 0.5, 0.5))
