import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.jaxprs import count_remats
from helpers.shapes import random_variables

from halvit_jax import capture
from halvit_jax.analysis.macs import count_macs
from halvit_jax.layers import conv
from halvit_jax.layers.drop import DropPath
from halvit_jax.models import create_model, fold
from halvit_jax.models.nextvit import PARTITION_RULES, NextViT
from halvit_jax.models.vit import HC
from halvit_jax.trees import flatten, variable_shapes

pytestmark = pytest.mark.slow  # what every family is held to by default stands in test_contract.py
CLASSES = 5
# A block of each kind, two stages, and a stem of stride 4: maps of 8x8 and 4x4, which is pooled to 2x2.
SMALL: dict[str, Any] = {
    "depths": (1, 2),
    "widths": (16, 24),
    "periods": (0, 2),
    "reductions": (1, 2),
    "stem_widths": (8, 8),
    "stem_strides": (2, 2),
    "head_width": 8,
    "num_classes": CLASSES,
    "image_size": 32,
}
# Parameters and billions of multiply-accumulates with the factors of the compact FFNs summed up.
DEPLOYED = {
    "nextvit_small": (27_523_772, 5.161),
    "nextvit_base": (38_841_968, 7.323),
    "nextvit_large": (50_160_164, 9.486),
}


def _images(model: NextViT, b: int = 2) -> jax.Array:
    shape = (b, model.image_size, model.image_size, 3)
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def _apply(model: NextViT, variables: Any, **keywords: Any) -> Any:
    with conv.xla_convolutions():  # quicker to compile
        return jax.jit(lambda v, x: model.apply(v, x, train=False, **keywords))(variables, _images(model))


def _size(shapes: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("fields", [{}, HC])
def test_folding_the_norms_and_factors_changes_no_output(fields: dict[str, Any]) -> None:
    model = NextViT(**SMALL, **fields)
    variables = random_variables(model)
    before = jax.tree.map(np.array, variables)
    folded, fewer = fold(model, variables)
    assert jax.tree.map(jnp.shape, fewer) == jax.tree.map(jnp.shape, variable_shapes(folded))
    expected, found = _apply(model, variables), _apply(folded, fewer)
    assert np.abs(found - expected).max() / expected.std() <= 1e-5
    blocks = [f"stage{stage}/block{i}" for stage, i in ((1, 0), (2, 0), (2, 1))]
    lone = {f"{block}/ffn_norm" for block in blocks} | {f"{blocks[2]}/attention_norm", "norm"}
    lone.add(f"{blocks[2]}/attention/pooled_norm")
    norms = {path for path in flatten(fewer["params"]) if "norm" in path}
    assert norms == {f"{path}/{leaf}" for path in lone for leaf in ("scale", "bias")}
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    with pytest.raises(ValueError, match="is folded and cannot be trained"):
        folded.apply(fewer, _images(model), train=True)


@pytest.mark.parametrize("name", DEPLOYED)
def test_deployed_counts_of_the_compact_models(name: str) -> None:
    params, gmacs = DEPLOYED[name]
    model = create_model(f"{name}_hc").clone(folded=True)
    shapes, images = variable_shapes(model), jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    # The host is counted with its norms, which have as many scales as the convolutions that they are folded into have
    # biases; of the compact layers no norm is left.
    scales = [leaf for path, leaf in flatten(shapes["params"]).items() if path.endswith("conv/bias")]
    assert _size(shapes) + _size(scales) == params
    with conv.xla_convolutions():
        macs = count_macs(lambda v, x: model.apply(v, x, train=False), shapes, images)
    assert macs / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_blocks_have_the_parameters_of_the_official_ones() -> None:
    params = variable_shapes(create_model("nextvit_small"))["params"]
    assert _size(params["stem"]) == 75_904
    assert {stage: [_size(block) for block in params[stage].values()] for stage in params if "stage" in stage} == {
        "stage1": [99_264, 92_928, 92_928],
        "stage2": [333_696, 314_880, 314_880, 447_488],
        "stage3": [
            *(1_244_928, 1_145_856, 1_145_856, 1_145_856, 1_746_944),
            *(1_343_232, 1_145_856, 1_145_856, 1_145_856, 1_746_944),
        ],
        "stage4": [4_750_848, 4_356_096, 6_900_224],
    }


def test_a_stage_ends_with_a_transformer_block_and_has_one_in_every_period() -> None:
    model = create_model("nextvit_small", depths=(1, 1, 7, 2), periods=(0, 4, 3, 1))
    assert [model.is_transformer_block(stage) for stage in range(4)] == [
        [False],
        [True],
        [True, False, False, True, False, False, True],
        [True, True],
    ]


def test_stochastic_depth_is_shared_out_in_a_transformer_block() -> None:
    model, rates = NextViT(**SMALL, drop_path=0.4), {}

    def note(call: Any, args: Any, keywords: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, DropPath):
            rates["/".join(context.module.path)] = context.module.rate
        return call(*args, **keywords)

    with nn.intercept_methods(note):
        variable_shapes(model)
    assert rates == {
        "stage1/block0/drop_path": 0.0,
        "stage2/block0/drop_path": 0.2,
        "stage2/block1/attention_drop": pytest.approx(0.3),
        "stage2/block1/local_drop": pytest.approx(0.1),
        "stage2/block1/ffn_drop": 0.4,
    }


def test_the_classifier_sees_the_mean_of_the_last_map_normalised() -> None:
    model = NextViT(**SMALL | {"num_classes": 0})
    variables = random_variables(model)
    assert "head" not in variables["params"]
    pooled, maps = _apply(model, variables), _apply(model, variables, method="features")
    assert {stride: a.shape for stride, a in maps.items()} == {4: (2, 8, 8, 16), 8: (2, 4, 4, 32)}
    norm, stats = variables["params"]["norm"], variables["batch_stats"]["norm"]
    normal = (maps[8].mean((1, 2)) - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(pooled, normal, atol=1e-5)


@pytest.mark.parametrize(("size", "sides"), [(224, (56, 28, 14, 7)), (200, (50, 25, 13, 7))])
def test_the_published_maps_are_of_strides_4_to_32(size: int, sides: tuple[int, ...]) -> None:
    model = create_model("nextvit_small", image_size=size, depths=(1, 1, 1, 1))
    images = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
    maps = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False, method="features"), variable_shapes(model), images
    )
    assert {stride: a.shape for stride, a in maps.items()} == {
        stride: (1, side, side, width)
        for stride, side, width in zip((4, 8, 16, 32), sides, (96, 256, 512, 1024), strict=True)
    }


def test_images_too_small_to_be_pooled_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a map of 1 places cannot be pooled 4 to one; raise model.image_size"):
        variable_shapes(NextViT(**SMALL | {"image_size": 8}))


def test_initial_values_are_the_released_ones() -> None:
    model = NextViT(**SMALL | {"depths": (1, 1)})
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles in a fraction of the default's time
    with conv.xla_convolutions():
        params = flatten(jax.jit(lambda: model.init(key, _images(model), train=False))()["params"])
    kernels = {path: a for path, a in params.items() if path.endswith("kernel")}
    for path, a in kernels.items():
        assert float(a.std()) == pytest.approx(0.02, rel=0.25), path
    for path, a in params.items():
        assert path in kernels or bool((a == path.endswith("scale")).all()), path


@pytest.mark.parametrize("fields", [{}, HC])
def test_training_moves_every_statistic(fields: dict[str, Any]) -> None:
    model = NextViT(**SMALL, **fields)
    variables, images = random_variables(model), _images(model, 4)
    with conv.xla_convolutions():
        _, changed = jax.jit(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]))(variables)
    stats = flatten(changed["batch_stats"])
    assert [path for path, old in flatten(variables["batch_stats"]).items() if jnp.array_equal(old, stats[path])] == []


def test_both_formulations_are_one_network() -> None:
    model = NextViT(**SMALL, **HC)
    variables = random_variables(model)
    ours = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, _images(model))
    native = _apply(model, variables)
    np.testing.assert_allclose(ours, native, atol=1e-5 * float(native.std()))


def test_remat_recomputes_each_block() -> None:
    models = [NextViT(**SMALL, remat=remat) for remat in (False, True)]
    counts = [count_remats(lambda v, m=m: m.apply(v, _images(m), train=False), variable_shapes(m)) for m in models]
    assert counts == [0, 3]


def test_attention_maps_are_captured() -> None:
    model = NextViT(**SMALL)
    shapes = jax.eval_shape(
        lambda v: capture(model, v, _images(model), ("attention", "blocks")), variable_shapes(model)
    )
    assert {name: a.shape for name, a in shapes["attention"].items()} == {"stage2/block1": (2, 3, 16, 4)}
    assert list(shapes["blocks"]) == ["stage1/block0", "stage2/block0", "stage2/block1"]


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("fields", [{}, HC])
def test_every_parameter_has_a_rule_of_its_shape(fields: dict[str, Any], folded: bool) -> None:
    for path, leaf in flatten(variable_shapes(NextViT(**SMALL, **fields, folded=folded))["params"]).items():
        spec = next(spec for pattern, spec in PARTITION_RULES if re.search(pattern, path))
        assert len(spec) == (leaf.ndim if path.endswith("kernel") else 0), path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (3, 4)}, r"model.depths=\(3, 4\), model.widths=.* must have one entry for each of a stage"),
        ({"depths": (), "widths": (), "periods": (), "reductions": ()}, "must have one entry for each of a stage"),
        ({"stem_strides": (2, 2)}, r"model.stem_strides=\(2, 2\) must have one entry for each of a convolution"),
        ({"depths": (3, 0, 10, 3)}, r"model.depths=\(3, 0, 10, 3\) must all be at least 1"),
        ({"reductions": (8, 4, 0, 1)}, r"model.reductions=\(8, 4, 0, 1\) must all be at least 1"),
        ({"stem_widths": (64, 0, 64, 64)}, r"model.stem_widths=\(64, 0, 64, 64\) must all be at least 1"),
        ({"periods": (0, -2, 5, 3)}, r"model.periods\[1\]=-2 must not be negative"),
        ({"widths": (96, 200, 384, 768)}, r"model.head_width=32 does not divide model.widths\[1\]=200"),
        ({"widths": (64, 128, 384, 768)}, r"model.widths\[1\]=128 must be a multiple of 3 model.head_width=96"),
        ({"head_width": 0}, r"model.head_width=0 does not divide model.widths\[0\]=96"),
        ({"real_heads": 0.0}, r"model.real_heads=0.0 must lie in \(0, 1\]"),
        ({"drop_path": 1.0}, r"model.drop_path=1.0 must lie in \[0, 1\)"),
    ],
)
def test_impossible_fields_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("nextvit_small", **fields)
