import re

import jax
import pytest

from halvit_jax.models import create_model, validation


def test_a_choice_that_is_not_allowed_is_listed_with_those_that_are() -> None:
    validation.check_choice("pool", "mean", ("token", "mean"))
    with pytest.raises(ValueError, match=re.escape("model.pool='max' is not one of token, mean")):
        validation.check_choice("pool", "max", ("token", "mean"))


@pytest.mark.parametrize(("value", "whole"), [(5, 12), (0, 12), (3, 0)])
def test_what_does_not_divide_is_named_with_both_fields(value: int, whole: int) -> None:
    validation.check_divides("num_heads", 3, "width", 12)
    with pytest.raises(ValueError, match=f"model.num_heads={value} does not divide model.width={whole}"):
        validation.check_divides("num_heads", value, "width", whole)


@pytest.mark.parametrize(
    ("name", "method"), [("pvt_tiny", "__call__"), ("pvt_v2_b0", "features"), ("resnet18", "__call__")]
)
def test_images_of_other_channels_are_refused_with_the_field(name: str, method: str) -> None:
    model = create_model(name, in_channels=1)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    with pytest.raises(ValueError, match="images of 3 channels for a model built for 1; set in_channels"):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False, method=method), images)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_rate_lies_between_0_and_1(value: float) -> None:
    validation.check_rate("drop_path", 0.0)
    with pytest.raises(ValueError, match=rf"model.drop_path={value} must lie in \[0, 1\)"):
        validation.check_rate("drop_path", value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0.0, "logits", 0.5, 2), "model.real_heads=0.0 must lie in (0, 1]"),
        ((1.0, "logits", 1.5, 2), "model.ffn_rank=1.5 must lie in (0, 1]"),
        ((1.0, "queries", 0.5, 2), "model.hallucinate='queries' is not one of logits, maps"),
        ((1.0, "maps", 0.5, 0), "model.ffn_branches=0 must be at least 1"),
    ],
)
def test_compact_fields_that_cannot_be_built_are_refused(fields: tuple, message: str) -> None:
    validation.check_compact(0.5, "logits", 0.5, 2)
    with pytest.raises(ValueError, match=re.escape(message)):
        validation.check_compact(*fields)
