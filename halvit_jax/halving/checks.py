"""What can be halved, and into what: refusals before anything is computed."""

import math
from typing import Any

from halvit_jax.halving.vit import COVARIANCES, Settings
from halvit_jax.models.minivit import MiniDeit
from halvit_jax.models.resnet import ResNet
from halvit_jax.models.vit import VisionTransformer

# Fields that teacher and student have in common.
SHAPE = ("num_classes", "image_size", "patch_size", "width", "depth", "num_heads", "ffn_ratio", "pool", "distilled")
SHAPE += ("position", "in_channels")
REASONS: dict[type, str] = {
    MiniDeit: "its relative positions, which all heads share, read the queries, so no basis of a head is free",
    ResNet: "its ReLUs leave no basis free, and a HaLViT-ResNet has one kernel for all bottlenecks of a stage",
}


def check_teacher(model: Any) -> None:
    """Raise a ValueError unless the model is a plain vision transformer, with the reason why not."""
    if type(model) is not VisionTransformer:
        reason = REASONS.get(type(model), "it is no plain vision transformer")
        raise ValueError(f"a teacher of {type(model).__name__} cannot be halved: {reason}; give a DeiT")
    for field in ("real_heads", "ffn_rank"):
        if getattr(model, field) != 1.0:
            raise ValueError(
                f"a teacher of {field}={getattr(model, field)} cannot be halved; give a DeiT with {field}=1"
            )


def check_pair(teacher: Any, student: Any) -> None:
    """Raise a ValueError unless the student is the teacher with at least one more kind of layer tied."""
    check_teacher(teacher)
    if type(student) is not VisionTransformer:
        raise ValueError(f"model.name is of a {type(student).__name__}; a halved DeiT is a HaLViT, such as halvit_tiny")
    wanted = {field: getattr(teacher, field) for field in SHAPE} | {"real_heads": 1.0, "ffn_rank": 1.0}
    for field, value in wanted.items():
        given = getattr(student, field)
        if given != value:
            raise ValueError(f"model.{field}={given!r}, but the teacher has {value!r}; halving keeps the shape")
    kinds = {field: (getattr(teacher, field), getattr(student, field)) for field in ("attention", "ffn")}
    for field, (before, after) in kinds.items():
        if before == "tied" != after:
            raise ValueError(f"model.{field}={after!r}, but the teacher's is tied already; set it to 'tied'")
    if all(before == after for before, after in kinds.values()):
        raise ValueError(
            f"model.attention={student.attention!r} and model.ffn={student.ffn!r} are the teacher's; set one of them "
            "to 'tied', or give an untied teacher"
        )
    copied = student.attention == teacher.attention
    if student.attention_bias not in {teacher.attention_bias, copied and teacher.attention_bias}:  # False if tied
        raise ValueError(
            f"model.attention_bias={student.attention_bias}, but the teacher has {teacher.attention_bias}; set it to "
            f"{teacher.attention_bias}"
        )


def check_images(model: VisionTransformer, number: int, size: tuple[int, int]) -> None:
    """Raise a ValueError unless so many images of this height and width determine the covariances of the model."""
    if size != (model.image_size, model.image_size):
        raise ValueError(
            f"images of {size[0]}x{size[1]} for a teacher of model.image_size={model.image_size}; give some of its size"
        )
    tokens = (model.image_size // model.patch_size) ** 2 + (model.pool == "token") + model.distilled
    needed = math.ceil(model.width / (tokens - 1)) if tokens > 1 else model.width
    if number < needed:
        raise ValueError(
            f"images={number} with {tokens} tokens each cannot determine covariances of width {model.width}; give at "
            f"least {needed}, better ten times as many"
        )


def check_settings(settings: Settings, devices: int) -> None:
    """Raise a ValueError unless the settings are possible on so many devices, which share each batch."""
    if settings.covariance not in COVARIANCES:
        raise ValueError(f"covariance={settings.covariance!r} is not one of {', '.join(COVARIANCES)}")
    for field, least in {"rounds": 0, "fit_steps": 0, "fit_batch": 1, "batch": 1}.items():
        if getattr(settings, field) < least:
            raise ValueError(f"{field}={getattr(settings, field)} must be at least {least}")
    for field in ("fit_batch", "batch"):
        if getattr(settings, field) % devices:
            raise ValueError(f"{field}={getattr(settings, field)} does not divide over {devices} devices")
