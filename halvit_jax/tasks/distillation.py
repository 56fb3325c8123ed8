"""Knowledge distillation: classification on the labels and on a teacher's logits and intermediates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halvit_jax.protocols import Batch, Loss, PyTree
from halvit_jax.tasks.classification import Classification
from halvit_jax.tasks.losses import DISTILL_LOSSES
from halvit_jax.tasks.metrics import classification_sums
from halvit_jax.tasks.minivit_losses import hidden_relation, layers_of, qkv_relation
from halvit_jax.trees import variable_shapes

# Field of the weight -> name of the sown intermediate, and the loss between two layers.
RELATIONS = {"qkv_weight": ("query_key_value", qkv_relation), "hidden_weight": ("hidden", hidden_relation)}


class Teacher(NamedTuple):
    """A trained model and the normalisation of its images."""

    model: nn.Module
    variables: PyTree  # for `model.apply`; shapes suffice if nothing is computed
    mean: Sequence[float]
    std: Sequence[float]


class Distillation(Classification):
    """Classification with a teacher, which sees the same erased and mixed images as the student `model`.

        loss = (1 - alpha) label(class head) + alpha distill(distillation head) + qkv_weight Q + hidden_weight H

    A student without a distillation head uses the class head for both. The teacher runs as in evaluation, and its
    variables are in `constants`. Evaluation is that of `Classification`.

    Args:
        model: the student.
        teacher: with the student's number of classes and image size.
        kind: a key of DISTILL_LOSSES: "hard" (DeiT), "soft" (Mini-DeiT) or "soft_cross_entropy" (Mini-Swin).
        alpha: weight of the teacher in the loss over classes.
        tau: temperature of both softmaxes, for the soft kinds.
        qkv_weight: of the relations among queries, keys and values, averaged over the pairs of layers.
        hidden_weight: of the relations among the outputs of blocks, averaged likewise.
        student_layers, teacher_layers: the pairs of layers for both, counted from 0 through the whole network.
        classification: the keywords of `Classification`; `loss` is that of the labels.

    Raises:
        ValueError: an invalid value, or student and teacher do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        teacher: Teacher,
        kind: str = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
        qkv_weight: float = 0.0,
        hidden_weight: float = 0.0,
        student_layers: Sequence[int] = (),
        teacher_layers: Sequence[int] = (),
        **classification: Any,
    ) -> None:
        super().__init__(model, **classification)
        weights = {"qkv_weight": qkv_weight, "hidden_weight": hidden_weight}
        _check_values(kind, alpha, tau, weights)
        _check_heads(model, kind, alpha, weights)
        if teacher.model.num_classes != model.num_classes:
            raise ValueError(
                f"the teacher has {teacher.model.num_classes} classes, the student model.num_classes="
                f"{model.num_classes}; give a teacher of the student's classes with teacher.init_from"
            )
        if teacher.model.in_channels != model.in_channels:
            raise ValueError(
                f"the teacher sees {teacher.model.in_channels} channels, the student model.in_channels="
                f"{model.in_channels}; give a teacher of the student's channels with teacher.init_from"
            )
        self._relations = {field: weight for field, weight in weights.items() if weight}
        self._layers = tuple(student_layers), tuple(teacher_layers)
        if self._relations:
            _check_layers(model, teacher, *self._layers, [RELATIONS[field][0] for field in self._relations])
        self.teacher = teacher.model
        self.constants = teacher.variables
        # From the student's normalisation to the teacher's: x -> x * scale + shift.
        mean, std = np.asarray(teacher.mean, np.float32), np.asarray(teacher.std, np.float32)
        scale, shift = self.std / std, (self.mean - mean) / std
        self._scale, self._shift = scale[None, None, None], shift[None, None, None]  # [1, 1, 1, 3]
        self._distill_loss, self._alpha, self._tau = DISTILL_LOSSES[kind], alpha, tau

    def loss(self, params: PyTree, model_state: PyTree, constants: PyTree, batch: Batch, key: jax.Array) -> Loss:
        """The mean training loss over the rows where mask is True; the sums contain its parts."""
        drop_key, augment_key = jax.random.split(key)
        images, targets = self._training_inputs(batch, augment_key)
        sown = ["intermediates"] if self._relations else []
        with self._norm_groups(batch):
            heads, new_state = self.model.apply(
                {"params": params, **model_state},
                images,
                train=True,
                mutable=[*model_state, *sown],
                rngs={"drop_path": drop_key},
                method="head_logits" if _is_distilled(self.model) else None,
            )
        teacher_logits, teacher_state = self.teacher.apply(
            constants, images * self._scale + self._shift, train=False, mutable=sown
        )
        heads = heads if _is_distilled(self.model) else {"class": heads}

        label = self._loss(heads["class"], targets)
        distill = self._distill_loss(heads.get("distill", heads["class"]), teacher_logits, self._tau)
        parts = {"label": label, "distill": distill}
        loss = (1.0 - self._alpha) * label + self._alpha * distill
        for field, weight in self._relations.items():
            name, relation = RELATIONS[field]
            networks = (layers_of(state["intermediates"], name) for state in (new_state, teacher_state))
            parts[field.removesuffix("_weight")] = related = self._related(relation, *networks, len(images))
            loss += weight * related
        sums = classification_sums(loss, sum(heads.values()), batch["label"], batch["mask"])
        sums |= {f"loss_{name}": jnp.sum(jnp.where(batch["mask"], part, 0.0)) for name, part in parts.items()}
        new_state = {name: state for name, state in new_state.items() if name not in sown}
        return Loss(sums["loss"] / jnp.maximum(sums["examples"], 1.0), new_state, sums)

    def _related(self, relation: Any, student: list[jax.Array], teacher: list[jax.Array], b: int) -> jax.Array:
        """The mean over the pairs of layers and an image's windows: [b]."""
        pairs = [relation(student[i], teacher[j]) for i, j in zip(*self._layers, strict=True)]
        return sum(pair.reshape(b, -1).mean(-1) for pair in pairs) / len(pairs)


def _is_distilled(model: nn.Module) -> bool:
    return bool(getattr(model, "distilled", False))


def _check_values(kind: str, alpha: float, tau: float, weights: dict[str, float]) -> None:
    if kind not in DISTILL_LOSSES:
        raise ValueError(f"distillation.kind={kind!r} is not one of {', '.join(DISTILL_LOSSES)}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"distillation.alpha={alpha} must lie between 0 and 1")
    if tau <= 0.0:
        raise ValueError(f"distillation.tau={tau} must be above 0")
    for field, weight in weights.items():
        if weight < 0.0:
            raise ValueError(f"distillation.{field}={weight} must not be negative")


def _check_heads(model: nn.Module, kind: str, alpha: float, weights: dict[str, float]) -> None:
    """Check that each head has a target that does not contradict another."""
    if not alpha and not any(weights.values()):
        fields = ", ".join(f"distillation.{field}" for field in ("alpha", *weights))
        raise ValueError(f"the teacher has no effect; set {fields} above 0, or task.name='classification'")
    if _is_distilled(model) and alpha in (0.0, 1.0):
        which = "class" if alpha else "distillation"
        raise ValueError(
            f"distillation.alpha={alpha} leaves the {which} head untrained, which evaluation uses too; set it "
            "between 0 and 1, or model.distilled=False"
        )
    if kind == "hard" and 0.0 < alpha < 1.0 and not _is_distilled(model):
        raise ValueError(
            "distillation.kind='hard' needs a student with a second head for the teacher's label; set "
            "model.distilled=True, distillation.alpha=1.0, or distillation.kind='soft'"
        )


def _check_layers(
    model: nn.Module, teacher: Teacher, student_layers: Sequence[int], teacher_layers: Sequence[int], names: list[str]
) -> None:
    """Check that the pairs of layers exist and have the same tokens."""
    if not student_layers or len(student_layers) != len(teacher_layers):
        raise ValueError(
            f"distillation.student_layers={student_layers} and distillation.teacher_layers={teacher_layers} must "
            "have the same number of layers, at least one"
        )
    size = model.image_size
    images = jax.ShapeDtypeStruct((1, size, size, model.in_channels), jnp.float32)
    whole = {
        "student": _intermediates(model, variable_shapes(model), images),
        "teacher": _intermediates(teacher.model, teacher.variables, images),
    }
    for name in names:
        found = {who: layers_of(sown, name) for who, sown in whole.items()}
        for who, layers in (("student", student_layers), ("teacher", teacher_layers)):
            if not found[who]:
                raise ValueError(
                    f"the {who} sows no {name} of its layers; set distillation.qkv_weight and "
                    "distillation.hidden_weight to 0, or choose a transformer"
                )
            wrong = [i for i in layers if not 0 <= i < len(found[who])]
            if wrong:
                raise ValueError(
                    f"distillation.{who}_layers has {wrong}, but the {who}'s are 0 to {len(found[who]) - 1}"
                )
        for i, j in zip(student_layers, teacher_layers, strict=True):
            pair = [found["student"][i].shape[:-1], found["teacher"][j].shape[:-1]]
            if pair[0] != pair[1]:
                raise ValueError(
                    f"the tokens of layer {i} in distillation.student_layers are {pair[0]}, those of layer {j} in "
                    f"distillation.teacher_layers {pair[1]}; pair layers of equal grids and of equal model.pool and "
                    "model.distilled"
                )


def _intermediates(model: nn.Module, variables: PyTree, images: jax.ShapeDtypeStruct) -> PyTree:
    """The shapes of the intermediates that the model sows."""

    def run(variables: PyTree, images: jax.Array) -> PyTree:
        return model.apply(variables, images, train=False, mutable=["intermediates"])[1].get("intermediates", {})

    return jax.eval_shape(run, variables, images)
