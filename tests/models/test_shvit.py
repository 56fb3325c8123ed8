import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.jaxprs import count_remats
from helpers.shapes import random_variables

from halvit_jax import capture
from halvit_jax.analysis.macs import count_macs
from halvit_jax.layers import conv
from halvit_jax.models import create_model, fold, shvit
from halvit_jax.models.shvit import KINDS, PARTITION_RULES, SHViT, multiple_of_8
from halvit_jax.trees import flatten, variable_shapes

pytestmark = pytest.mark.slow  # what every family is held to by default stands in test_contract.py
CLASSES = 5
# A block of each kind, two stages, and a stem of stride 4: maps of 8x8 and 4x4.
SMALL: dict[str, Any] = {
    "depths": (1, 2),
    "widths": (16, 20),
    "partial_dims": (8, 12),
    "stages": ("i", "s"),
    "stem_strides": (2, 2),
    "num_classes": CLASSES,
    "image_size": 32,
}
# Folded: parameters, and billions of multiply-accumulates as published.
FOLDED = {
    "shvit_s1": (6_308_660, 0.24140),
    "shvit_s2": (11_453_508, 0.36551),
    "shvit_s3": (14_210_010, 0.60071),
    "shvit_s4": (16_546_248, 0.98643),
}


def _images(model: SHViT, b: int = 2) -> jax.Array:
    shape = (b, model.image_size, model.image_size, 3)
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def _apply(model: SHViT, variables: Any, **keywords: Any) -> Any:
    return jax.jit(lambda v, x: model.apply(v, x, train=False, **keywords))(variables, _images(model))


@pytest.mark.parametrize("distilled", [False, True])
def test_folding_the_norms_and_shortcuts_changes_no_output(distilled: bool) -> None:
    model = SHViT(**SMALL, distilled=distilled)
    variables = random_variables(model)
    before = jax.tree.map(np.array, variables)
    folded, fewer = fold(model, variables)
    assert jax.tree.map(jnp.shape, fewer) == jax.tree.map(jnp.shape, variable_shapes(folded))
    expected = _apply(model, variables, method="head_logits")
    for name, found in _apply(folded, fewer, method="head_logits").items():
        assert np.abs(found - expected[name]).max() / expected[name].std() <= 1e-5
    norms = {path for path in flatten(fewer["params"]) if "norm" in path}
    assert norms == {f"stage2/block{i}/attention/norm/{leaf}" for i in (0, 1) for leaf in ("scale", "bias")}
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    with pytest.raises(ValueError, match="is folded and cannot be trained"):
        folded.apply(fewer, _images(model), train=True)


@pytest.mark.parametrize("name", FOLDED)
def test_folded_counts_are_the_published_ones(name: str) -> None:
    params, gmacs = FOLDED[name]
    model = create_model(name).clone(folded=True)
    shapes = variable_shapes(model)
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), "float32")
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == params
    with conv.xla_convolutions():
        macs = count_macs(lambda v, x: model.apply(v, x, train=False), shapes, images)
        maps = jax.eval_shape(lambda v, x: model.apply(v, x, train=False, method="features"), shapes, images)
    # The published figures add five operations for each number that a group normalisation has, one for each pooled.
    places = [leaf.shape[1] * leaf.shape[2] for leaf in maps.values()]
    attending = zip(places, model.depths, model.partial_dims, model.stages, strict=True)
    normalised = sum(n * depth * partial for n, depth, partial, kind in attending if KINDS[kind])
    pooled = places[-1] * model.widths[-1]
    assert round((macs + 5 * normalised + pooled) / 1e9, 5) == gmacs


def test_a_distilled_model_answers_with_the_mean_of_its_classifiers() -> None:
    model = SHViT(**SMALL, distilled=True)
    variables = random_variables(model)
    heads = _apply(model, variables, method="head_logits")
    assert {name: (a.shape, a.dtype) for name, a in heads.items()} == {
        "class": ((2, CLASSES), jnp.float32),
        "distill": ((2, CLASSES), jnp.float32),
    }
    assert not np.allclose(heads["class"], heads["distill"])
    np.testing.assert_array_equal(_apply(model, variables), (heads["class"] + heads["distill"]) / 2)
    params, stats = (
        {name: tree for name, tree in variables[kind].items() if name != "head_distill"}
        for kind in ("params", "batch_stats")
    )
    plain = _apply(SHViT(**SMALL), {"params": params, "batch_stats": stats}, method="head_logits")
    assert plain.keys() == {"class"}
    np.testing.assert_allclose(plain["class"], heads["class"], rtol=1e-5, atol=1e-6)


def test_the_classifier_sees_the_mean_of_the_last_map() -> None:
    model = SHViT(**SMALL | {"num_classes": 0}, distilled=True)
    variables = random_variables(model)
    assert not any(name.startswith("head") for name in variables["params"])
    pooled, maps = _apply(model, variables), _apply(model, variables, method="features")
    assert {stride: a.shape for stride, a in maps.items()} == {4: (2, 8, 8, 16), 8: (2, 4, 4, 20)}
    np.testing.assert_allclose(pooled, maps[8].mean((1, 2)), atol=1e-6)
    heads = _apply(model, variables, method="head_logits")
    assert heads.keys() == {"class"}
    np.testing.assert_array_equal(heads["class"], pooled)


@pytest.mark.parametrize(("size", "sides"), [(224, (14, 7, 4)), (256, (16, 8, 4))])
def test_the_published_maps_are_of_strides_16_32_and_64(size: int, sides: tuple[int, ...]) -> None:
    model = create_model("shvit_s4", image_size=size)
    images = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
    maps = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False, method="features"), variable_shapes(model), images
    )
    assert {stride: a.shape for stride, a in maps.items()} == {
        stride: (1, side, side, width) for stride, side, width in zip((16, 32, 64), sides, model.widths, strict=True)
    }


def test_squeeze_excite_is_a_quarter_wide_in_multiples_of_8() -> None:
    widths = {}
    for name in FOLDED:
        params = flatten(variable_shapes(create_model(name))["params"])
        widths[name] = [params[f"stage{i}/merge/excite/reduce/bias"].size for i in (2, 3)]
    assert widths == {
        "shvit_s1": [128, 224],
        "shvit_s2": [128, 312],  # of 308
        "shvit_s3": [192, 352],
        "shvit_s4": [224, 336],
    }
    assert [multiple_of_8(n) for n in (1, 11, 12, 19, 20, 24)] == [8, 8, 16, 16, 24, 24]


def test_blocks_begin_as_their_shortcuts() -> None:
    model = SHViT(**SMALL | {"depths": (1, 1)})
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles in a fraction of the default's time
    variables = jax.jit(lambda: model.init(key, _images(model), train=False))()
    params = flatten(variables["params"])
    zero = {path for path, a in params.items() if path.endswith("scale") and not a.any()}
    ffns = {f"{block}/ffn/reduce" for block in ("stage1/block0", "stage2/before", "stage2/after", "stage2/block0")}
    others = {"stage1/block0/local", "stage2/block0/local", "stage2/block0/attention/output"}
    assert zero == {f"{path}/norm/scale" for path in ffns | others}
    rest = {path: a for path, a in params.items() if path.endswith("scale") and path not in zero}
    assert all(bool((a == 1).all()) for a in rest.values())
    assert float(params["head/linear/kernel"].std()) == pytest.approx(0.02, rel=0.2)
    assert not params["head/linear/bias"].any()
    kernel = params["stage2/merge/expand/conv/kernel"]
    assert float(jnp.abs(kernel).max()) <= 16**-0.5
    assert float(kernel.std()) == pytest.approx((3 * 16) ** -0.5, rel=0.05)


def test_training_moves_every_statistic() -> None:
    model = SHViT(**SMALL)
    variables, images = random_variables(model), _images(model, 4)
    _, changed = jax.jit(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]))(variables)
    stats = flatten(changed["batch_stats"])
    assert [path for path, old in flatten(variables["batch_stats"]).items() if jnp.array_equal(old, stats[path])] == []


def test_both_formulations_are_one_network() -> None:
    model = SHViT(**SMALL)
    variables = random_variables(model)
    ours = _apply(model, variables)
    with conv.xla_convolutions():
        native = _apply(model, variables)
    np.testing.assert_allclose(ours, native, atol=1e-5 * float(native.std()))


def test_remat_recomputes_each_block() -> None:
    models = [SHViT(**SMALL, remat=remat) for remat in (False, True)]
    counts = [count_remats(lambda v, m=m: m.apply(v, _images(m), train=False), variable_shapes(m)) for m in models]
    # Three blocks, and a merging with a block before and one after it.
    assert counts == [0, 3 + 3]


def test_attention_maps_are_captured() -> None:
    model = SHViT(**SMALL)
    found = jax.jit(lambda v: capture(model, v, _images(model), ("attention", "blocks")))(random_variables(model))
    assert list(found["attention"]) == ["stage2/block0", "stage2/block1"]
    assert list(found["blocks"]) == ["stage1/block0", "stage2/block0", "stage2/block1"]
    for weights in found["attention"].values():
        assert weights.shape == (2, 1, 16, 16)
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


def test_every_parameter_has_a_rule_of_its_shape() -> None:
    params = flatten(variable_shapes(SHViT(**SMALL, distilled=True))["params"])
    for path, leaf in params.items():
        (spec,) = [spec for pattern, spec in PARTITION_RULES if re.search(pattern, path)]
        assert len(spec) in (0, leaf.ndim), path


def test_there_is_a_distilled_model_of_each_size() -> None:
    plain = {name: fields for name, fields in shvit.SIZES.items() if "distilled" not in fields}
    assert plain.keys() == FOLDED.keys()
    distilled = {f"{name}_distilled": size | {"distilled": True} for name, size in plain.items()}
    assert plain | distilled == shvit.SIZES


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (2, 4)}, r"model.depths=\(2, 4\), model.widths=.* must have one entry for each stage"),
        ({"depths": (), "widths": (), "partial_dims": (), "stages": ()}, "must have one entry for each stage"),
        ({"stages": ("i", "s", "t")}, rf"model.stages='t' is not one of {', '.join(KINDS)}"),
        ({"depths": (2, 0, 5)}, r"model.depths=\(2, 0, 5\) must all be at least 1"),
        ({"stem_strides": ()}, r"model.stem_strides=\(\) must all be at least 1, and there must be one"),
        ({"stem_strides": (2, 0)}, r"model.stem_strides=\(2, 0\) must all be at least 1"),
        ({"partial_dims": (32, 48, 321)}, "model.partial_dims=321 in a stage of model.widths 320; give 1 to 320"),
        ({"partial_dims": (32, 0, 68)}, "model.partial_dims=0 in a stage of model.widths 224; give 1 to 224"),
        ({"widths": (132, 224, 320)}, r"model.widths\[0\]=132 must be a multiple of 8"),
        ({"widths": (0, 224, 320)}, r"model.widths\[0\]=0 must be a multiple of 8"),
        ({"drop_path": 0.1}, "model.drop_path=0.1: shvit_s1 has no such field"),
    ],
)
def test_impossible_fields_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("shvit_s1", **fields)
