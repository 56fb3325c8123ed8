"""Weights that begin another model than their own."""

import pathlib
import re
from typing import Any

import numpy as np
import pytest

from halvit_jax.convert import readers, shapes_of, to_torch, weights_file
from halvit_jax.convert.transfer import (
    RESAMPLINGS,
    Transfer,
    adapt_input_channels,
    adapt_position_grid,
    read_for,
    torch_bicubic,
    transfer,
)
from halvit_jax.models import create_model, transfer_rules
from halvit_jax.trees import unflatten

TINY = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 24, "num_classes": 5}


def arrays_of(name: str, **fields: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = shapes_of(create_model(name, **fields)).items()
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes}


def begin(name: str, arrays: dict[str, np.ndarray], *, exclude: tuple[str, ...] = (), **fields: Any) -> Transfer:
    model = create_model(name, **fields)
    return transfer(name, arrays, shapes_of(model), transfer_rules(model), exclude=exclude)


@pytest.mark.parametrize("name", ["halvit_tiny", "deit_small"])
def test_a_vit_gets_another_head_and_another_grid(name: str) -> None:
    arrays = arrays_of(name, **TINY)
    found = begin(name, arrays, **TINY | {"num_classes": 7, "image_size": 40})
    assert found.initialized == ["params/head/bias (7,)", "params/head/kernel (32, 7)"]
    assert sorted(found.unused) == ["params/head/bias (5,)", "params/head/kernel (32, 5)"]
    assert found.adapted == ["params/position/embedding (10, 32) -> (26, 32)"]
    same = arrays.keys() - {"params/head/bias", "params/head/kernel", "params/position/embedding"}
    assert found.arrays.keys() == same | {"params/position/embedding"}
    assert all(np.array_equal(found.arrays[path], arrays[path]) for path in same)
    assert found.lines()[0] == f"{len(same)} arrays copied"
    assert found.lines()[2] == "initialized: params/head/bias (7,), params/head/kernel (32, 7)"


def test_what_is_the_same_is_taken_whole() -> None:
    arrays = arrays_of("resnet18", num_classes=3)
    found = begin("resnet18", arrays, num_classes=3, image_size=384)
    assert found.lines() == [f"{len(arrays)} arrays copied"]


def test_a_classifier_may_be_initialized_be_missing_or_be_too_much() -> None:
    arrays = arrays_of("resnet18", num_classes=3)
    asked = begin("resnet18", arrays, exclude=("^head/kernel",), num_classes=3)
    assert asked.initialized == ["params/head/kernel (512, 3)"]
    assert "params/head/bias" in asked.arrays
    none = begin("resnet18", arrays, num_classes=0)
    assert len(none.unused) == 2
    added = begin("resnet18", arrays_of("resnet18", num_classes=0), num_classes=3)
    assert len(added.initialized) == 2
    assert not added.unused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, r"cannot initialise halvit_tiny; \d+ missing: params/block2/attention/key_value/kernel, "),
        ({"depth": 1}, r"unexpected: params/block1/"),
        ({"width": 64}, r"24 shape mismatch: .*params/block0/ffn/bias \(is \(32,\), must be \(64,\)\)"),
        ({"patch_size": 4}, r"shape mismatch: params/embed/kernel"),
        (
            {"pool": "mean"},
            r"shape mismatch: params/position/embedding \(is \(10, 32\), must be \(9, 32\)\); .*unexpected",
        ),
        ({"attention": "full"}, r"missing: .*attention/qkv/kernel"),
    ],
)
def test_everything_that_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        begin("halvit_tiny", arrays_of("halvit_tiny", **TINY), **TINY | change)


def test_a_path_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("init_exclude: '^haed/' matches no path of resnet18")):
        begin("resnet18", arrays_of("resnet18"), exclude=("^haed/",))


def test_torchs_bicubic_has_the_numbers_of_torch() -> None:
    """interpolate(mode="bicubic") of PyTorch 2.13, enlarging 3 to 5 and reducing 5 to 3."""
    enlarged = [
        [-0.57821, -0.30032, 0.328, 1.4271, 2.18971],
        [1.17591, 1.79852, 2.95854, 4.47483, 5.46426],
        [4.92698, 6.05506, 8.0, 10.14824, 11.48565],
        [11.04322, 12.48829, 14.9424, 17.55162, 19.1564],
        [15.23258, 16.82832, 19.53021, 22.38056, 24.12917],
    ]
    grid = (np.arange(9.0).reshape(3, 3, 1)) ** 1.5
    np.testing.assert_allclose(torch_bicubic(grid, 5)[..., 0], enlarged, atol=2e-5)
    reduced = [[-0.076638, 0.896175, -0.175333], [-0.713312, -0.536573, 0.864176], [0.826208, -0.332328, -0.732769]]
    np.testing.assert_allclose(torch_bicubic(np.sin(np.arange(25.0)).reshape(5, 5, 1), 3)[..., 0], reduced, atol=2e-6)


def test_positions_are_resampled_as_the_field_says() -> None:
    shapes, table = {"params/position/embedding": (37, 2)}, np.random.default_rng(0).standard_normal((17, 2))
    arrays, rules = {"params/position/embedding": table.astype(np.float32)}, (("position/embedding$", "position_grid"),)
    for positions, function in RESAMPLINGS.items():
        found = transfer("a model", arrays, shapes, rules, exclude=(), positions=positions)
        (array,) = found.arrays.values()
        np.testing.assert_array_equal(array[0], arrays["params/position/embedding"][0])
        expected = function(arrays["params/position/embedding"][1:].reshape(4, 4, 2), 6).reshape(36, 2)
        np.testing.assert_allclose(array[1:], expected, atol=1e-6)
    with pytest.raises(ValueError, match="init_positions='nearest' is not one of timm, torch"):
        transfer("a model", arrays, shapes, rules, exclude=(), positions="nearest")


def test_positions_are_resampled_between_grids_and_tokens_before_them_kept() -> None:
    rows, columns = np.meshgrid(np.linspace(0, 1, 14), np.linspace(0, 2, 14), indexing="ij")
    smooth = np.stack([rows, columns], -1).reshape(-1, 2)
    array = np.concatenate([[[5.0, 6.0]], smooth]).astype(np.float32)
    larger = adapt_position_grid(array, (577, 2))
    np.testing.assert_array_equal(larger[0], [5.0, 6.0])
    grid = larger[1:].reshape(24, 24, 2)
    step = 14 / 24  # of the old grid's pixels, whose first centre lies at 0 and whose last at 13
    places = ((np.arange(24) + 0.5) * step - 0.5) / 13
    np.testing.assert_allclose(grid[4:-4, 5, 0], places[4:-4], atol=1e-5)  # a plane stays one, but at the edges
    np.testing.assert_allclose(grid[5, 4:-4, 1], 2 * places[4:-4], atol=1e-5)
    np.testing.assert_allclose(adapt_position_grid(array, (197, 2)), array, atol=1e-6)
    assert adapt_position_grid(array, (577, 3)) is None
    assert adapt_position_grid(array, (200, 2)) is None


def keys(distance: np.ndarray) -> np.ndarray:
    """Cubic convolution after Keys (1981), a = -1/2."""
    x = np.abs(distance)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def bicubic(grid: np.ndarray, side: int) -> np.ndarray:
    """A square map [n, n] at the centres of `side` x `side` cells; at the edges the weights inside count alone."""
    old = len(grid)
    centres = (np.arange(side) + 0.5) * old / side - 0.5
    weights = keys(centres[:, None] - np.arange(old))
    weights /= weights.sum(1, keepdims=True)
    return weights @ grid @ weights.T


@pytest.mark.parametrize("name", ["swin_tiny", "mini_swin_tiny"])
def test_tables_of_relative_positions_are_resampled_head_by_head(name: str) -> None:
    """From windows of 7 at 224 to windows of 12 at 384."""
    fields = {"width": 8, "head_width": 4, "depths": (2, 2), "num_classes": 3}
    fields |= {"shares": (2, 2)} if name == "mini_swin_tiny" else {}
    arrays = arrays_of(name, **fields, image_size=224)
    found = begin(name, arrays, **fields, image_size=384, window_size=12)
    tables = [path for path in arrays if path.endswith("position_bias/table")]
    assert len(found.adapted) == len(tables) == (2 if name == "mini_swin_tiny" else 4)
    for path in tables:
        heads = arrays[path].shape[1]
        assert (arrays[path].shape, found.arrays[path].shape) == ((13**2, heads), (23**2, heads))
        for head in range(heads):
            expected = bicubic(arrays[path][:, head].reshape(13, 13), 23).reshape(-1)
            np.testing.assert_allclose(found.arrays[path][:, head], expected, atol=1e-5)


def test_a_mini_deit_gets_another_grid_and_keeps_its_relative_positions() -> None:
    fields = {"width": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    arrays = arrays_of("mini_deit_tiny", **fields)
    found = begin("mini_deit_tiny", arrays, **fields, image_size=384)
    assert found.adapted == ["params/position/embedding (196, 16) -> (576, 16)"]
    for path in (f"params/block0/repeat{i}/position/table" for i in range(2)):
        np.testing.assert_array_equal(found.arrays[path], arrays[path])
    embedding = arrays["params/position/embedding"].reshape(14, 14, 16)
    expected = np.stack([bicubic(embedding[..., i], 24) for i in range(16)], -1).reshape(576, 16)
    np.testing.assert_allclose(found.arrays["params/position/embedding"], expected, atol=1e-5)


def test_a_kernel_for_grey_images_answers_them_as_the_old_one_answered_equal_colours() -> None:
    rng = np.random.default_rng(0)
    kernel, grey = rng.standard_normal((7, 7, 3, 4)), rng.standard_normal((7, 7, 1))
    wanted = (np.repeat(grey, 3, 2)[..., None] * kernel).sum((0, 1, 2))
    one = adapt_input_channels(kernel, (7, 7, 1, 4))
    np.testing.assert_allclose((grey[..., None] * one).sum((0, 1, 2)), wanted, rtol=1e-4)
    three = adapt_input_channels(one, (7, 7, 3, 4))
    np.testing.assert_allclose((np.repeat(grey, 3, 2)[..., None] * three).sum((0, 1, 2)), wanted, rtol=1e-4)
    assert adapt_input_channels(kernel, (7, 7, 4, 4)) is None
    assert adapt_input_channels(kernel, (3, 3, 1, 4)) is None


def test_files_of_every_format_can_initialise_a_model(tmp_path: pathlib.Path) -> None:
    """A file of ours knows its fields; a PyTorch state is read by the model's names, with sizes of its own."""
    arrays = arrays_of("halvit_tiny", **TINY)
    wanted = create_model("halvit_tiny", **TINY | {"num_classes": 0, "image_size": 40})
    weights_file.save(tmp_path / "ours.safetensors", "halvit_tiny", unflatten(arrays), **TINY)
    readers.write(tmp_path / "torch.safetensors", to_torch("halvit_tiny", unflatten(arrays), **TINY), {})
    for file in ("ours.safetensors", "torch.safetensors"):
        read = read_for(tmp_path / file, "halvit_tiny", wanted)
        assert read.keys() >= arrays.keys() - {"params/head/kernel", "params/head/bias"}
        assert all(np.array_equal(arrays[path], array) for path, array in read.items())


def test_a_state_may_differ_in_sizes_only_where_that_is_allowed(tmp_path: pathlib.Path) -> None:
    arrays = arrays_of("halvit_tiny", **TINY)
    state = to_torch("halvit_tiny", unflatten(arrays), **TINY)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][..., 0]  # no longer of four dimensions
    state["norm.bias"] = state["norm.bias"][:5]
    readers.write(tmp_path / "torch.safetensors", state, {})
    message = r"2 shape mismatch: norm.bias \(is \(5,\), must be \(32,\)\), patch_embed.proj.weight"
    with pytest.raises(ValueError, match=message):
        read_for(tmp_path / "torch.safetensors", "halvit_tiny", create_model("halvit_tiny", **TINY))
