"""DeiT-Ti against timm's, in inference and in a training step."""

import json
import pathlib
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.models import create_model
from halvit_jax.training.paths import flat, map_paths

# Names of PyTorch's state turned into our paths, one substitution after the other.
RENAMED = {
    r"^blocks\.(\d+)\.": r"block\1/",
    r"^patch_embed\.proj\.": "embed/",
    r"attn\.qkv\.": "attention/qkv/",
    r"attn\.proj\.": "attention/output/",
    r"mlp\.fc1\.": "ffn/expand/",
    r"mlp\.fc2\.": "ffn/reduce/",
    r"norm1\.": "attention_norm/",
    r"norm2\.": "ffn_norm/",
    r"\.": "/",
    r"norm/weight$": "norm/scale",
    r"weight$": "kernel",
    r"^cls_token$": "class_token",
    r"^pos_embed$": "position/embedding",
}


def _our_path(name: str) -> str:
    for pattern, replacement in RENAMED.items():
        name = re.sub(pattern, replacement, name)
    return name


def _our_array(array: np.ndarray) -> np.ndarray:
    """[out, in] -> [in, out]; [out, in, h, w] -> [h, w, in, out]; tokens without their leading ones."""
    if array.ndim == 3:
        return array[0].squeeze() if array.shape[1] == 1 else array[0]
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


@pytest.fixture(scope="module")
def deit(golden: pathlib.Path, reference_weights: types.ModuleType) -> dict[str, Any]:
    """timm's DeiT-Ti as a parameter tree of ours, and what it computes."""
    case = json.loads((golden / "deit_tiny.json").read_text())
    model = create_model("deit_tiny")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False))["params"]
    arrays = {
        _our_path(name): _our_array(reference_weights.weights(name, tuple(shape)))
        for name, shape in case["state"].items()
    }
    assert {path: array.shape for path, array in arrays.items()} == {p: s.shape for p, s in flat(shapes).items()}
    params = map_paths(lambda path, _: arrays[path], shapes)
    with np.load(golden / "deit_tiny.npz") as file:
        outputs = dict(file)
    order = [_our_path(name) for name in case["grad_norm_order"]]
    return {"model": model, "params": params, "grad_norm_order": order, **outputs}


def test_deit_tiny_gives_the_logits_of_timm(deit: dict[str, Any], reference_weights: types.ModuleType) -> None:
    images = jnp.asarray(reference_weights.image(2, 224, 224).transpose(0, 2, 3, 1))
    logits = jax.jit(lambda p, x: deit["model"].apply({"params": p}, x, train=False))(deit["params"], images)
    assert np.abs(logits - deit["logits"]).max() / deit["logits"].std() <= 1e-4


def test_deit_tiny_takes_the_training_step_of_timm(deit: dict[str, Any], reference_weights: types.ModuleType) -> None:
    images = jnp.asarray(reference_weights.image(8, 224, 224).transpose(0, 2, 3, 1))

    def loss(params: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        logits = deit["model"].apply({"params": params}, images, train=True)
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits[:, :10]))), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(deit["params"])
    reference = deit["train_output"]
    assert np.abs(logits[:, :16] - reference).max() / reference.std() <= 1e-4
    assert float(value) == pytest.approx(float(deit["train_loss"]), rel=1e-4)
    norms = {path: float(jnp.linalg.norm(gradient)) for path, gradient in flat(grads).items()}
    np.testing.assert_allclose([norms[path] for path in deit["grad_norm_order"]], deit["grad_norm"], rtol=1e-3)
    assert norms.keys() == set(deit["grad_norm_order"])
