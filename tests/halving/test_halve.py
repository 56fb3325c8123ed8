"""The function that halves a model in memory."""

import numpy as np
import pytest
from helpers.halving import Teacher

import halvit_jax

OPTIONS = {"fit_steps": 60, "fit_batch": 64, "batch": 16}


def test_halve_returns_a_halvit_and_its_variables(untied: Teacher, images: np.ndarray) -> None:
    lines: list[str] = []
    model, variables = halvit_jax.halve(*untied, images, **OPTIONS, log=lines.append)
    assert (model.attention, model.ffn, model.attention_bias) == ("tied", "tied", False)
    assert model.apply(variables, images, train=False).shape == (40, 10)
    assert [line.split(":")[0] for line in lines] == ["block 0", "block 1"]
    assert "error of attention" in lines[0]
    kept, _ = halvit_jax.halve(*untied, images, **OPTIONS | {"fit_steps": 0}, attention="full")
    assert (kept.attention, kept.attention_bias) == ("full", True)


def test_halve_refuses_before_it_computes(untied: Teacher, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"images of 4x8 for a teacher of model.image_size=8"):
        halvit_jax.halve(*untied, images[:, :4])
    with pytest.raises(ValueError, match="images=0 with 17 tokens each"):
        halvit_jax.halve(*untied, images[:0])
    with pytest.raises(ValueError, match="rounds=-2 must be at least 0"):
        halvit_jax.halve(*untied, images, rounds=-2)
    with pytest.raises(ValueError, match="ResNet cannot be halved"):
        halvit_jax.halve(halvit_jax.create_model("resnet18"), {}, images)
