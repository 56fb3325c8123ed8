"""What a model computes on its way."""

from typing import Any

import jax
import numpy as np
import pytest
from helpers.tiers import tiered

import halvit_jax

VIT = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 4, "image_size": 12, "num_classes": 5}


@pytest.mark.parametrize("name", tiered(["halvit_tiny", "deit_tiny"], {"halvit_tiny"}))
def test_attention_and_blocks_of_a_transformer(name: str) -> None:
    model = halvit_jax.create_model(name, **VIT)
    images = jax.random.normal(jax.random.key(1), (2, 12, 12, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    assert variables.keys() == {"params"}  # nothing is kept unasked
    found = halvit_jax.capture(model, variables, images, ("attention", "blocks"))
    assert list(found["attention"]) == list(found["blocks"]) == ["block0", "block1", "block2"]
    for weights in found["attention"].values():
        assert weights.shape == (2, 2, 10, 10)
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    last = np.asarray(found["blocks"]["block2"])[:, 0]
    params = jax.tree.map(np.asarray, variables["params"])
    normal = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
    logits = (normal * params["norm"]["scale"] + params["norm"]["bias"]) @ params["head"]["kernel"]
    expected = model.apply(variables, images, train=False)
    np.testing.assert_allclose(logits + params["head"]["bias"], expected, atol=1e-5)


@pytest.mark.slow
def test_layers_that_share_their_matrices_are_seen_one_by_one() -> None:
    fields = VIT | {"depth": 4, "image_size": 16}
    model = halvit_jax.create_model("mini_deit_tiny", **fields)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images)
    found = jax.jit(lambda v, x: halvit_jax.capture(model, v, x, ("attention", "blocks")))(variables, images)
    repeats = [f"block{i}/repeat{k}" for i in range(2) for k in range(2)]
    assert sorted(found["attention"]) == repeats
    assert sorted(found["blocks"]) == sorted([*repeats, "block0", "block1"])
    for weights in found["attention"].values():
        assert weights.shape == (2, 2, 16, 16)
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    for i in range(2):
        np.testing.assert_array_equal(found["blocks"][f"block{i}"], found["blocks"][f"block{i}/repeat1"])


def test_a_swins_attention_is_that_of_its_windows() -> None:
    shape = {"width": 8, "depths": (2, 1), "head_width": 4, "window_size": 4, "image_size": 32, "num_classes": 5}
    found = _abstract("swin_tiny", ("attention", "blocks"), **shape)
    shapes = {name: weights.shape for name, weights in found["attention"].items()}
    assert shapes == {
        "stage1/block0": (8, 2, 16, 16),
        "stage1/block1": (8, 2, 16, 16),
        "stage2/block0": (2, 4, 16, 16),
    }
    assert found["blocks"]["stage1/block1"].shape == (2, 8, 8, 8)


def test_the_order_is_that_of_the_blocks() -> None:
    names = []
    _abstract("deit_tiny", seen=names, **VIT | {"depth": 12})
    assert names == [f"block{i}" for i in range(12)]
    names.clear()
    _abstract("mini_deit_tiny", seen=names, **VIT | {"depth": 4})
    assert names == ["block0/repeat0", "block0/repeat1", "block1/repeat0", "block1/repeat1"]


def _abstract(
    name: str, captures: tuple[str, ...] = ("attention",), seen: list[str] | None = None, **fields: Any
) -> Any:
    """What is captured of a model, as shapes; `seen` gets the names of the attention maps, in their order."""
    model = halvit_jax.create_model(name, **fields)

    def run(images: jax.Array) -> Any:
        variables = model.init(jax.random.key(0), images, train=False)
        found = halvit_jax.capture(model, variables, images, captures)
        if seen is not None:
            seen.extend(found["attention"])
        return found

    return jax.eval_shape(run, jax.ShapeDtypeStruct((2, model.image_size, model.image_size, 3), "float32"))


@pytest.mark.slow
def test_a_resnet_has_blocks_and_no_attention() -> None:
    model = halvit_jax.create_model("resnet18", num_classes=5, image_size=32)
    images = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    blocks = halvit_jax.capture(model, variables, images, ("blocks",))["blocks"]
    assert blocks["stage4/block1"].shape == (1, 1, 1, 512)
    maps = model.apply(variables, images, train=False, method="features")
    np.testing.assert_array_equal(blocks["stage2/block1"], maps[8])
    with pytest.raises(ValueError, match="capture='attention': ResNet has none"):
        halvit_jax.capture(model, variables, images)
    with pytest.raises(ValueError, match="capture='logits' is not one of attention, blocks"):
        halvit_jax.capture(model, variables, images, ("logits",))


def test_one_name_may_stand_alone() -> None:
    assert list(_abstract("deit_tiny", "attention", **VIT)["attention"]) == ["block0", "block1", "block2"]
