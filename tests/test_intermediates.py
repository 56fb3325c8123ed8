"""What a model computes on its way."""

import jax
import numpy as np
import pytest

import halvit_jax

VIT = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 4, "image_size": 12, "num_classes": 5}


@pytest.mark.parametrize("name", ["halvit_tiny", "deit_tiny"])
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
    params = variables["params"]
    normal = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
    logits = (normal * params["norm"]["scale"] + params["norm"]["bias"]) @ params["head"]["kernel"]
    expected = model.apply(variables, images, train=False)
    np.testing.assert_allclose(logits + params["head"]["bias"], expected, atol=1e-5)


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
