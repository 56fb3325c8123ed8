"""DeiT under timm's names and HaLViT under ours, and a HaLViT as a DeiT."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.official import check_values_keep_their_places, official_shapes

import halvit_jax
from halvit_jax.convert import from_torch, shapes_of, to_torch, torch_shapes
from halvit_jax.models import create_model
from halvit_jax.trees import unflatten

TINY = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 24, "num_classes": 5}


def variables_of(name: str, **fields: Any) -> dict[str, Any]:
    """Random variables that keep a signal's size."""
    rng = np.random.default_rng(0)
    shapes = shapes_of(create_model(name, **fields)).items()
    return unflatten({path: (rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32) for path, s in shapes})


def logits_of(name: str, variables: Any, **fields: Any) -> np.ndarray:
    model = create_model(name, **fields)
    shape = (2, model.image_size, model.image_size, 3)
    images = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images))


@pytest.mark.parametrize(("name", "ratio"), [("deit_tiny", 1), ("deit_small", 2), ("deit_base", 4)])
def test_all_sizes_have_the_names_of_timm(name: str, ratio: int) -> None:
    # What depends on the width is a multiple of 192 in deit_tiny, and nothing else is.
    tiny = official_shapes("deit_tiny").items()
    assert torch_shapes(name) == {key: tuple(n * ratio if n % 192 == 0 else n for n in shape) for key, shape in tiny}


def test_the_distilled_have_a_token_a_position_and_a_classifier_more() -> None:
    more = {"dist_token": (1, 1, 192), "head_dist.weight": (1000, 192), "head_dist.bias": (1000,)}
    assert torch_shapes("deit_tiny_distilled") == torch_shapes("deit_tiny") | more | {"pos_embed": (1, 198, 192)}


def test_another_resolution_has_more_positions() -> None:
    assert torch_shapes("deit_tiny", image_size=384)["pos_embed"] == (1, 577, 192)


@pytest.mark.parametrize("kind", [np.float16, jnp.bfloat16])
def test_half_precision_becomes_float32_without_loss(kind: Any) -> None:
    fields = TINY | {"depth": 1}
    state = {
        name: array.astype(kind)
        for name, array in to_torch("deit_tiny", variables_of("deit_tiny", **fields), **fields).items()
    }
    back = to_torch("deit_tiny", from_torch("deit_tiny", state, **fields), **fields)
    assert {array.dtype for array in back.values()} == {np.dtype(np.float32)}
    assert all(np.array_equal(back[name], array.astype(np.float32)) for name, array in state.items())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("halvit_tiny", {}),
        ("halvit_small", {"attention_bias": True}),
        ("halvit_tiny", {"pool": "mean", "position": "sincos", "num_classes": 0}),
        ("deit_tiny", {"attention_bias": False, "position": "none"}),
        ("deit_tiny_distilled", {}),
    ],
)
def test_native_names_make_the_round_trip(name: str, changes: dict[str, Any]) -> None:
    fields = TINY | changes
    assert len(check_values_keep_their_places(name, **fields)) == len(shapes_of(create_model(name, **fields)))


def test_a_tied_matrix_is_stored_once_and_as_a_linear_layer_has_it() -> None:
    names = torch_shapes("halvit_tiny", **TINY)
    assert names["blocks.1.mlp.tied.weight"] == (128, 32)
    assert [name for name in names if "blocks.0.attn" in name] == [
        "blocks.0.attn.key_value.weight",
        "blocks.0.attn.query_output.weight",
    ]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("halvit_tiny", {}),
        ("halvit_tiny", {"attention_bias": True, "position": "sincos", "distilled": True}),
        ("halvit_tiny", {"attention": "full", "position": "none", "pool": "mean"}),
    ],
)
def test_a_halvit_as_a_deit_gives_the_same_logits(name: str, changes: dict[str, Any]) -> None:
    fields = TINY | changes
    variables = variables_of(name, **fields)
    state = to_torch(name, variables, as_deit=True, **fields)
    deit = TINY | {"pool": fields.get("pool"), "distilled": fields.get("distilled")}
    assert {key: array.shape for key, array in state.items()} == torch_shapes("deit_small", **deit)
    ours, theirs = (
        logits_of(name, variables, **fields),
        logits_of("deit_small", from_torch("deit_small", state, **deit), **deit),
    )
    assert ours.std() > 0.1
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * ours.std())


def test_attention_biases_are_zero_where_there_were_none() -> None:
    state = halvit_jax.to_torch("halvit_tiny", variables_of("halvit_tiny", **TINY), as_deit=True, **TINY)
    assert state["blocks.1.attn.qkv.bias"].shape == (96,)
    assert not state["blocks.1.attn.qkv.bias"].any()
    assert not state["blocks.0.attn.proj.bias"].any()
    assert np.array_equal(state["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc2.weight"].T)


def test_at_full_size_the_names_and_shapes_are_those_of_deit_small() -> None:
    zeros = unflatten(
        {path: np.broadcast_to(np.float32(0), s) for path, s in shapes_of(create_model("halvit_tiny")).items()}
    )
    state = to_torch("halvit_tiny", zeros, as_deit=True)
    assert {key: array.shape for key, array in state.items()} == torch_shapes("deit_small")
    assert {array.dtype for array in state.values()} == {np.dtype(np.float32)}


def test_a_deit_stays_what_it_is() -> None:
    variables = variables_of("deit_tiny", **TINY)
    plain, as_deit = (to_torch("deit_tiny", variables, as_deit=flag, **TINY) for flag in (False, True))
    assert plain.keys() == as_deit.keys()
    assert all(np.array_equal(plain[name], as_deit[name]) for name in plain)


def test_a_state_of_another_size_is_refused() -> None:
    state = to_torch("deit_tiny", variables_of("deit_tiny", **TINY), **TINY)
    with pytest.raises(ValueError, match=r"do not fit deit_tiny; 2 shape mismatch: head.\w+ .*, head.\w+ .*5") as error:
        from_torch("deit_tiny", state, **TINY | {"num_classes": 7})
    assert "head.weight (is (5, 32), must be (7, 32))" in str(error.value)
    with pytest.raises(ValueError, match=r"2 unexpected: head.bias, head.weight$"):
        from_torch("deit_tiny", dict(sorted(state.items())), **TINY | {"num_classes": 0})
    with pytest.raises(ValueError, match=r"1 shape mismatch: pos_embed \(is \(1, 10, 32\), must be \(1, 17, 32\)\)$"):
        from_torch("deit_tiny", state, **TINY | {"image_size": 32})
    with pytest.raises(ValueError, match=r"these variables do not fit deit_tiny; .*params/head/bias"):
        to_torch("deit_tiny", from_torch("deit_tiny", state, **TINY), **TINY | {"num_classes": 0})
