"""Which implementation computes a feed-forward layer, and that the layers use it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from halvit_jax.layers import ffn as ffn_module
from halvit_jax.layers.ffn import FFN, Compact, Mlp
from halvit_jax.layers.fused_ffn import FFN_FUSED_ON, FFN_IMPLS, choose_ffn
from halvit_jax.layers.placement import Place
from halvit_jax.layers.tpu_ffn import ffn_in_vmem
from halvit_jax.models import create_model

BF16, F32 = jnp.bfloat16, jnp.float32
TPU = Place("tpu", "TPU v5 lite", rows=8)
GIVEN = {"place": TPU, "dtype": jnp.dtype(BF16), "shape": (1024, 197, 384), "hidden": 1536, "tied": True}


@pytest.mark.parametrize(
    ("wanted", "change", "chosen"),
    [
        ("auto", {}, "pallas"),
        ("fused", {"tied": False}, "pallas"),
        ("auto", {"shape": (1024, 197, 768), "hidden": 3072, "tied": False}, "pallas"),
        ("xla", {}, "xla"),
        ("auto", {"place": Place("gpu", "NVIDIA H100")}, "xla"),
        ("auto", {"place": Place("cpu", "cpu")}, "xla"),
        ("auto", {"dtype": jnp.dtype(F32)}, "xla"),
        ("auto", {"needs_hidden": "it is compact"}, "xla"),
    ],
)
def test_which_implementation_computes_the_layer(wanted: str, change: dict[str, Any], chosen: str) -> None:
    assert choose_ffn(wanted, **GIVEN | change) == chosen
    assert set(FFN_FUSED_ON.values()) == FFN_IMPLS.keys()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"place": Place("gpu", "NVIDIA H100")}, "platforms tpu, not gpu"),
        ({"dtype": jnp.dtype(F32)}, r"bfloat16, not float32 \(compute_dtype\)"),
        ({"shape": (1024, 1000, 384)}, "1000 tokens do not divide into blocks of a multiple of 16 up to 640"),
        ({"shape": (1020, 197, 384)}, "1020 rows do not divide"),
        ({"place": TPU._replace(tensor=4)}, "whole matrices, not mesh.tensor=4"),
        ({"hidden": 1 << 15}, "MiB of the 128 MiB next to the cores of TPU v5 lite"),
        ({"place": TPU._replace(kind="TPU v3")}, "a TPU v5e or newer, not 'TPU v3'"),
        ({"needs_hidden": "it is compact"}, "it is compact"),
    ],
)
def test_an_impossible_fused_layer_is_refused_by_field(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"model.ffn_impl='fused' is not possible: .*{says}"):
        choose_ffn("fused", **GIVEN | change)


@pytest.mark.parametrize(("kind", "dtype"), [pytest.param("dense", "bfloat16", marks=pytest.mark.slow), ("tied", BF16)])
def test_a_layer_is_fused_where_it_can_be(kind: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def recorded(x: jax.Array, weights: tuple[jax.Array, ...], biases: Any) -> jax.Array:
        calls.append(len(weights))
        return ffn_in_vmem(x, weights, biases, True)

    monkeypatch.setattr(ffn_module, "current", lambda: TPU._replace(rows=1))
    monkeypatch.setitem(FFN_IMPLS, "pallas", recorded)
    layer = FFN[kind](16, 32, dtype=dtype)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 16)), BF16)
    params = layer.init(jax.random.key(0), x, train=False)
    assert not calls
    fused, grads = value_and_gradient(layer, params, x)
    assert set(calls) == {2 if kind == "dense" else 1}
    plain, expected = value_and_gradient(FFN[kind](16, 32, dtype=dtype, ffn_impl="xla"), params, x)
    np.testing.assert_allclose(fused, plain, rtol=0.02)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=0.05 * float(b.std()) + 0.02)


def value_and_gradient(layer: nn.Module, params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    def loss(params: Any) -> jax.Array:
        return jnp.sum(layer.apply(params, x, train=True).astype(F32) ** 2)

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"activation": nn.relu}, "its activation is not GELU"), ({"compact": Compact(0.5)}, r"model\.ffn_rank")],
)
def test_layers_that_need_their_hidden_activations_say_why(fields: dict[str, Any], says: str) -> None:
    layer, x = Mlp(16, 32, ffn_impl="fused", dtype=BF16, **fields), jnp.zeros((2, 3, 16), BF16)
    shapes = jax.eval_shape(functools.partial(layer.init, train=False), jax.random.key(0), x)
    with pytest.raises(ValueError, match=f"model.ffn_impl='fused'.*{says}"):
        jax.eval_shape(lambda given: layer.apply(given, x, train=False), shapes)


@pytest.mark.parametrize("name", ["deit_tiny", "swin_tiny", "pvt_tiny"])
def test_models_name_the_field_when_it_is_wrong(name: str) -> None:
    with pytest.raises(ValueError, match=r"model.ffn_impl='pallas' is not one of auto, xla, fused"):
        create_model(name, ffn_impl="pallas")
    assert create_model(name, ffn_impl="xla").ffn_impl == "xla"
