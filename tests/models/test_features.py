"""Feature maps of rectangles, as a detector takes them, against mmdetection's."""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np

from halvit_jax.convert import from_torch
from halvit_jax.layers import conv
from halvit_jax.models import create_model


def test_features_of_a_rectangle_are_those_of_mmdetections_backbone(
    golden: pathlib.Path, reference_weights: types.ModuleType
) -> None:
    """By way of its FPN, of whose maps mean and standard deviation are known."""
    case = json.loads((golden / "detection" / "resnet18_fpn.json").read_text())
    state = {name: reference_weights.weights(name, tuple(shape)) for name, shape in case["state"].items()}
    backbone = {name.removeprefix("backbone."): array for name, array in state.items() if name.startswith("backbone.")}
    model = create_model("resnet18", num_classes=0)
    variables = from_torch("resnet18", backbone, num_classes=0)
    height, width = case["canvas"]
    images = reference_weights.image(2, height, width).transpose(0, 2, 3, 1)
    for image, (rows, columns) in zip(images, case["image_shapes"], strict=True):
        image[rows:], image[:, columns:] = 0, 0

    @jax.jit
    def pyramid(variables: dict, images: jax.Array) -> list[jax.Array]:
        maps = model.apply(variables, images, train=True, frozen_norms=True, method="features")
        merged, out = None, []
        for i, stride in reversed(list(enumerate((4, 8, 16, 32)))):
            lateral, output = (
                (state[f"neck.{kind}.{i}.conv.weight"].transpose(2, 3, 1, 0), state[f"neck.{kind}.{i}.conv.bias"])
                for kind in ("lateral_convs", "fpn_convs")
            )
            finer = conv.convolve(maps[stride], lateral[0]) + lateral[1][None, None, None]
            merged = finer if merged is None else finer + merged.repeat(2, 1).repeat(2, 2)
            out.insert(0, conv.convolve(merged, output[0]) + output[1][None, None, None])
        return out

    with conv.xla_convolutions():
        found = pyramid(variables, jnp.asarray(images))
    for i, feature in enumerate(found):
        expected = case[f"map{i}"]
        batch, channels, rows, columns = expected["shape"]
        assert feature.shape == (batch, rows, columns, channels)
        np.testing.assert_allclose(feature.mean(), expected["mean"], atol=1e-4 * expected["std"])
        np.testing.assert_allclose(feature.std(), expected["std"], rtol=1e-4)
