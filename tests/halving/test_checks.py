"""What cannot be halved."""

from typing import Any

import pytest
from helpers.halving import SHAPE

from halvit_jax.halving import checks
from halvit_jax.halving.vit import Settings
from halvit_jax.models import create_model

DEIT = create_model("deit_small", **SHAPE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mini_deit_tiny",
            "MiniDeit cannot be halved: its relative positions, which all heads share, read",
        ),
        ("resnet50", "ResNet cannot be halved: its ReLUs leave no basis free, and a HaLViT-ResNet has one kernel"),
        ("swin_tiny", "SwinTransformer cannot be halved: it is no plain vision transformer; give a DeiT"),
        ("deit_tiny_hc", "a teacher of real_heads=0.5 cannot be halved"),
    ],
)
def test_models_that_are_no_plain_deit_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checks.check_teacher(create_model(name))


def test_a_teacher_with_compact_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a teacher of ffn_rank=0\.5 cannot be halved"):
        checks.check_teacher(create_model("deit_small", ffn_rank=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32}, "model.width=32, but the teacher has 16; halving keeps the shape"),
        ({"depth": 3}, "model.depth=3, but the teacher has 2"),
        ({"image_size": 12}, "model.image_size=12, but the teacher has 8"),
        ({"distilled": True}, "model.distilled=True, but the teacher has False"),
        ({"real_heads": 0.5}, r"model.real_heads=0.5, but the teacher has 1\.0"),
        ({"attention": "full", "ffn": "dense", "attention_bias": True}, "are the teacher's; set one of them to 'tied'"),
        ({"attention": "full"}, "model.attention_bias=False, but the teacher has True; set it to True"),
    ],
)
def test_students_of_another_shape_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checks.check_pair(DEIT, create_model("halvit_tiny", **SHAPE | changes))


def test_what_is_tied_already_stays_tied() -> None:
    half = DEIT.clone(attention="tied", attention_bias=False)
    with pytest.raises(ValueError, match=r"model.attention='full', but the teacher's is tied already"):
        checks.check_pair(half, DEIT.clone(ffn="tied"))
    with pytest.raises(ValueError, match=r"model.attention_bias=True, but the teacher has False; set it to False"):
        checks.check_pair(half, half.clone(ffn="tied", attention_bias=True))
    checks.check_pair(half, half.clone(ffn="tied"))
    for fields in ({}, {"attention_bias": True}, {"ffn": "dense"}):
        checks.check_pair(DEIT, create_model("halvit_tiny", **SHAPE | fields))


def test_a_student_that_is_no_vision_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.name is of a ResNet; a halved DeiT is a HaLViT, such as halvit_tiny"):
        checks.check_pair(DEIT, create_model("halvit_resnet50"))


def test_images_of_another_size_and_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of 12x8 for a teacher of model.image_size=8; give some of its size"):
        checks.check_images(DEIT, 100, (12, 8))
    wide = DEIT.clone(width=64)
    with pytest.raises(ValueError, match=r"images=3 with 17 tokens each .* width 64; give at least 4"):
        checks.check_images(wide, 3, (8, 8))
    checks.check_images(wide, 4, (8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"covariance": "none"}, "covariance='none' is not one of data, identity"),
        ({"rounds": -1}, "rounds=-1 must be at least 0"),
        ({"fit_batch": 0}, "fit_batch=0 must be at least 1"),
        ({"fit_batch": 12}, "fit_batch=12 does not divide over 8 devices"),
        ({"batch": 20}, "batch=20 does not divide over 8 devices"),
    ],
)
def test_settings_that_are_not_possible_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checks.check_settings(Settings(**changes), 8)
