"""Whole models: exact where the teacher is tied, better than averages where not, resumable, sharded."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from helpers.halving import Teacher, written_out
from helpers.tiers import tiered
from jax.sharding import NamedSharding

from halvit_jax.halving import vit
from halvit_jax.training.sharding import BATCH, make_mesh

SETTINGS = vit.Settings(fit_steps=60, fit_batch=64, batch=16)
TIED = {"attention": "tied", "ffn": "tied", "attention_bias": False}


def logits(model: Any, params: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(model.apply({"params": params}, images, train=False))


def batches(images: np.ndarray) -> Iterator[np.ndarray]:
    return (images[first : first + 24] for first in range(0, len(images), 24))  # the last is of 16


def halved(teacher: Teacher, images: np.ndarray, tied: dict[str, Any], **options: Any) -> list[vit.HalvedBlock]:
    student = teacher.model.clone(**tied)
    given = options.pop("settings", SETTINGS)
    return list(
        vit.halved_blocks(teacher.model, student, teacher.variables["params"], batches(images), given, **options)
    )


@pytest.mark.parametrize(
    "fields", tiered([{}, {"distilled": True}, {"attention_bias": True}], [{"distilled": True}]), ids=str
)
def test_a_tied_teacher_written_out_is_recovered(fields: dict[str, Any], images: np.ndarray) -> None:
    teacher = written_out(**fields)
    tied = TIED | {"attention_bias": fields.get("attention_bias", False)}
    blocks = halved(teacher, images, tied)
    for block in blocks:
        assert block.attention.after < 1e-8 < block.attention.before or block.attention.before < 1e-8
        assert block.ffn.after < 1e-9
    student, params = teacher.model.clone(**tied), vit.assembled(teacher.variables["params"], blocks)
    expected = logits(teacher.model, teacher.variables["params"], images)
    np.testing.assert_allclose(logits(student, params, images), expected, atol=1e-4 * expected.std())


@pytest.mark.parametrize("kept", [{"ffn": "dense"}, {"attention": "full", "attention_bias": True}], ids=str)
def test_one_kind_of_layer_alone_is_tied(kept: dict[str, Any], untied: Teacher, images: np.ndarray) -> None:
    given = untied.variables["params"]
    blocks = halved(untied, images, TIED | kept)
    for i, block in enumerate(blocks):
        if "ffn" in kept:
            np.testing.assert_array_equal(
                block.params["ffn"]["expand"]["kernel"], given[f"block{i}"]["ffn"]["expand"]["kernel"]
            )
            assert block.attention.after < 0.9 * block.attention.before
        else:
            assert block.attention == (0.0, 0.0)
            jax.tree.map(np.testing.assert_array_equal, block.params["attention"], given[f"block{i}"]["attention"])
            assert block.ffn.after < block.ffn.before
    student = untied.model.clone(**TIED | kept)
    assert np.isfinite(logits(student, vit.assembled(given, blocks), images)).all()


def test_the_fit_and_the_data_lower_the_errors(untied: Teacher, images: np.ndarray) -> None:
    images = images * np.linspace(0.0, 3.0, 8)[:, None, None].astype(np.float32)  # far from white
    fitted = halved(untied, images, TIED)
    bare = halved(untied, images, TIED, settings=SETTINGS._replace(fit_steps=0, covariance="identity"))
    for block, other in zip(fitted, bare, strict=True):
        assert block.attention.after < other.attention.after
        assert block.ffn.after < block.ffn.before
        assert other.ffn.after == other.ffn.before  # without a step


def stop_at(call: int) -> Callable[[], bool]:
    answers = iter([False] * (call - 1) + [True])
    return lambda: next(answers)


@pytest.mark.parametrize("call", tiered([1, 2, 3, 4], {3}))
def test_a_stopped_halving_goes_on_to_the_same_values(call: int, untied: Teacher, images: np.ndarray) -> None:
    """Asked before a block, behind its attention, in its fit, and before the next block."""
    whole = halved(untied, images, TIED)
    student, blocks = untied.model.clone(**TIED), []
    arguments = (untied.model, student, untied.variables["params"])
    with pytest.raises(vit.Stopped) as stopped:
        blocks.extend(vit.halved_blocks(*arguments, batches(images), SETTINGS, stop=stop_at(call)))
    unfinished = stopped.value.unfinished
    assert (unfinished is not None) == (call == 3)
    kept = whole[: call == 4]
    rest = halved(untied, images, TIED, done=len(kept), unfinished=unfinished)
    jax.tree.map(np.testing.assert_array_equal, [each.params for each in kept + rest], [each.params for each in whole])


def test_eight_devices_give_the_blocks_of_one(untied: Teacher, images: np.ndarray) -> None:
    one = halved(untied, images, TIED)
    eight = halved(untied, images, TIED, sharding=NamedSharding(make_mesh(), BATCH))
    for block, other in zip(one, eight, strict=True):
        np.testing.assert_allclose(block.attention, other.attention, rtol=1e-3)
        np.testing.assert_allclose(block.ffn, other.ffn, rtol=1e-2)
        np.testing.assert_allclose(
            block.params["ffn"]["tied"]["kernel"], other.params["ffn"]["tied"]["kernel"], rtol=1e-2, atol=1e-3
        )
