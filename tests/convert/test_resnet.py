"""ResNets under torchvision's names, and HaLViT's under their authors'."""

import re

import jax
import numpy as np
import pytest
from helpers.official import Shapes, check_values_keep_their_places, official_shapes, zeros
from helpers.tiers import CORE, tiered

from halvit_jax import convert
from halvit_jax.convert import engine, from_torch, shapes_of, to_torch
from halvit_jax.convert.engine import from_torch_arrays
from halvit_jax.models import FAMILIES, create_model, family_of, list_models
from halvit_jax.models.resnet import ResNet
from halvit_jax.trees import unflatten

GOLDEN = ("resnet18", "resnet50", "halvit_resnet50")
SMALL = {"depths": (1, 1, 2, 1), "image_size": 32, "num_classes": 3}
# Of all weights, with the classifier of each model; running statistics and counters are not weights.
PARAMS = {"resnet101": 44_549_160, "resnext101_32x8d": 88_791_336, "halvit_resnext101_32x8d": 25_876_776}


def resnet101() -> Shapes:
    """ResNet-101 has 23 blocks instead of 6 in its third stage; all but the first are alike."""
    like = {key: shape for key, shape in official_shapes("resnet50").items() if key.startswith("layer3.1.")}
    more = {key.replace("layer3.1.", f"layer3.{i}."): shape for i in range(6, 23) for key, shape in like.items()}
    return official_shapes("resnet50") | more


def resnext101() -> Shapes:
    """ResNeXt-101 32x8d is a ResNet-101 whose blocks are four times as wide inside, in groups of 32."""

    def wider(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if key.endswith("num_batches_tracked"):
            return shape
        if re.search(r"\.(conv1|bn1|bn2)\.", key):
            return (4 * shape[0], *shape[1:])
        if ".conv2." in key:
            return (4 * shape[0], 4 * shape[1] // 32, 3, 3)
        return (shape[0], 4 * shape[1], 1, 1) if ".conv3." in key else shape

    return {key: wider(key, shape) if "layer" in key else shape for key, shape in resnet101().items()}


def halvit_resnext101() -> Shapes:
    """The authors' ResNeXt101Halvit: their stem, ResNeXt's stages 1 and 2, their lists in stages 3 and 4, and `fc`."""
    plain = resnext101()
    state = {key: shape for key, shape in plain.items() if re.match(r"layer[12]|fc", key)}
    state |= {key: shape for key, shape in official_shapes("halvit_resnet50").items() if key.startswith("stem")}
    for stage, blocks, width, channels in ((3, 23, 1024, 1024), (4, 3, 2048, 2048)):
        layer = f"layer{stage}"
        state[f"{layer}.convp"] = (width, channels, 1, 1)
        state[f"{layer}.channel_adapter.weight"] = state[f"{layer}.downsample.0.weight"] = (
            channels,
            channels // 2,
            1,
            1,
        )
        norms = {f"{layer}.downsample.1": channels}
        for i in range(blocks):
            state[f"{layer}.conv2_list.{i}.weight"] = (width, width // 32, 3, 3)
            norms |= {f"{layer}.bn_pre_list.{i}": channels, f"{layer}.bn2_list.{i}": width}
            norms[f"{layer}.bn_post_list.{i}"] = channels
        for norm, size in norms.items():
            state |= {f"{norm}.{key}": (size,) for key in ("weight", "bias", "running_mean", "running_var")}
            state[f"{norm}.num_batches_tracked"] = ()
    return state


OTHERS = {"resnet101": resnet101, "resnext101_32x8d": resnext101, "halvit_resnext101_32x8d": halvit_resnext101}


@pytest.mark.parametrize("name", tiered(OTHERS, {"resnet101"}))
def test_the_other_sizes_load_by_the_same_tables(name: str) -> None:
    shapes, model = OTHERS[name](), create_model(name)
    weights = (np.prod(shape) for key, shape in shapes.items() if not re.search(r"running_|num_batches", key))
    assert sum(weights) == PARAMS[name]
    rules, wanted = convert.TABLES[type(model)](model), shapes_of(model)
    arrays = from_torch_arrays(name, rules, zeros(shapes), wanted)
    assert {path: array.shape for path, array in arrays.items()} == wanted
    assert {key: array.shape for key, array in engine.to_torch(rules, arrays).items()} == shapes


def test_every_model_of_a_family_with_a_table_is_tested() -> None:
    assert all(family.model in convert.TABLES for family in FAMILIES)
    assert {name for name in list_models() if family_of(name).model is ResNet} == {*GOLDEN, *OTHERS}


@pytest.mark.parametrize("name", tiered([*GOLDEN, *OTHERS], CORE))
def test_values_keep_their_places(name: str) -> None:
    fields = SMALL | ({"groups": 4, "base_width": 16} if "resnext" in name else {})
    check_values_keep_their_places(name, **fields)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny"])
def test_a_state_of_a_parallel_model_is_read(name: str) -> None:
    swin = {"width": 8, "depths": (1, 1), "head_width": 4, "window_size": 4, "image_size": 32, "num_classes": 3}
    small = SMALL if name == "resnet18" else swin
    rng = np.random.default_rng(0)
    state = {
        key: rng.standard_normal(shape).astype(np.float32) if shape else np.zeros((), np.int64)
        for key, shape in convert.torch_shapes(name, **small).items()
    }
    wrapped = {f"module.{key}": array for key, array in state.items()}
    jax.tree.map(np.testing.assert_array_equal, from_torch(name, wrapped, **small), from_torch(name, state, **small))
    with pytest.raises(ValueError, match=r"unexpected: module\.more"):  # of a state with both, all are named
        from_torch(name, state | {"module.more": np.zeros(3, np.float32)}, **small)


def test_the_number_of_updates_is_not_kept() -> None:
    shapes = shapes_of(create_model("resnet18", **SMALL))
    variables = unflatten({path: np.ones(shape, np.float32) for path, shape in shapes.items()})
    state = to_torch("resnet18", variables, **SMALL)
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    assert len(counters) == sum(path.endswith("/var") for path in shapes)
    for key in counters:
        assert (state[key].dtype, state[key].shape) == (np.int64, ())
        state[key] = np.int64(7)
    again = to_torch("resnet18", from_torch("resnet18", state, **SMALL), **SMALL)
    assert all(again[key] == 0 for key in counters)


def test_what_has_no_table_or_is_no_vit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = unflatten(zeros(shapes_of(create_model("resnet18", **SMALL))))
    with pytest.raises(ValueError, match="as_deit=True needs a vision transformer, not resnet18"):
        to_torch("resnet18", variables, as_deit=True, **SMALL)
    monkeypatch.setattr(convert, "TABLES", {})
    with pytest.raises(ValueError, match="resnet18 has no table of PyTorch names yet"):
        from_torch("resnet18", {})


def test_the_authors_state_needs_a_model_without_classifier() -> None:
    with pytest.raises(ValueError, match=r"do not fit halvit_resnet50; 2 missing: fc.bias, fc.weight$"):
        from_torch("halvit_resnet50", zeros(official_shapes("halvit_resnet50")))
