import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.jaxprs import count_remats
from helpers.runs import classification

from halvit_jax.config import default_config
from halvit_jax.layers import conv
from halvit_jax.models import create_model, family_of, fold, partition_rules
from halvit_jax.models.vit import VisionTransformer
from halvit_jax.training.optim import make_optimizer
from halvit_jax.training.sharding import make_mesh
from halvit_jax.training.state import abstract_state
from halvit_jax.trees import flatten

D, F, DEPTH, SIZE, CLASSES = 32, 128, 1, 16, 5
SMALL = {"width": D, "depth": DEPTH, "num_heads": 2, "image_size": SIZE, "patch_size": 8, "num_classes": CLASSES}


def _images(b: int = 2, size: int = SIZE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((b, size, size, 3)), jnp.float32)


def _params(model: VisionTransformer, dtype: type = np.float32) -> dict[str, Any]:
    """Random values everywhere, so that no bias hides behind a zero."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda shape: (0.2 * rng.standard_normal(shape.shape)).astype(dtype), shapes)


def _apply(model: VisionTransformer, params: dict[str, Any], images: jax.Array, **keywords: Any) -> Any:
    return jax.jit(lambda p, x: model.apply({"params": p}, x, **({"train": False} | keywords)))(params, images)


def _untied(params: dict[str, Any]) -> dict[str, Any]:
    """The DeiT that computes the same: W and its transpose as two matrices, attention biases of zero."""
    untied_params = dict(params)
    for i in range(DEPTH):
        block = params[f"block{i}"]
        wq, wkv = (block["attention"][name]["kernel"] for name in ("query_output", "key_value"))
        w, ffn = block["ffn"]["tied"]["kernel"], block["ffn"]
        untied_params[f"block{i}"] = block | {
            "attention": {
                "qkv": {"kernel": np.concatenate([wq, wkv, wkv.T], axis=1), "bias": np.zeros(3 * D, wq.dtype)},
                "output": {"kernel": wq.T, "bias": np.zeros(D, wq.dtype)},
            },
            "ffn": {
                "expand": {"kernel": w, "bias": ffn["hidden_bias"]},
                "reduce": {"kernel": w.T, "bias": ffn["bias"]},
            },
        }
    return untied_params


def _added_up(grads: dict[str, Any]) -> dict[str, Any]:
    """Gradients of the DeiT -> of the HaLViT: what a matrix got in its first and in its second use, summed."""
    tied = dict(grads)
    for i in range(DEPTH):
        block = grads[f"block{i}"]
        attention, ffn = block["attention"], block["ffn"]
        query, key, value = jnp.split(attention["qkv"]["kernel"], 3, axis=1)
        tied[f"block{i}"] = block | {
            "attention": {
                "query_output": {"kernel": query + attention["output"]["kernel"].T},
                "key_value": {"kernel": key + value.T},
            },
            "ffn": {
                "tied": {"kernel": ffn["expand"]["kernel"] + ffn["reduce"]["kernel"].T},
                "hidden_bias": ffn["expand"]["bias"],
                "bias": ffn["reduce"]["bias"],
            },
        }
    return tied


def test_a_halvit_is_a_deit_whose_matrices_are_w_and_w_transposed() -> None:
    tied, untied = create_model("halvit_tiny", **SMALL), create_model("deit_small", **SMALL)
    params = _params(tied)
    ours, expected = _apply(tied, params, _images(8)), _apply(untied, _untied(params), _images(8))
    assert float(jnp.abs(ours - expected).max() / expected.std()) <= 1e-5


def test_the_gradient_of_every_tied_kernel_is_the_sum_of_both_uses() -> None:
    with jax.enable_x64(True):
        tied, untied = (create_model(name, **SMALL, dtype="float64") for name in ("halvit_tiny", "deit_small"))
        params, images = _params(tied, np.float64), _images().astype(jnp.float64)
        weights = jnp.asarray(np.random.default_rng(2).standard_normal((2, CLASSES)), jnp.float32)  # the logits' type

        def loss(model: VisionTransformer, params: dict[str, Any]) -> jax.Array:
            return jnp.sum(weights * model.apply({"params": params}, images, train=True))

        ours = flatten(jax.jit(jax.grad(lambda p: loss(tied, p)))(params))
        expected = flatten(_added_up(jax.jit(jax.grad(lambda p: loss(untied, p)))(_untied(params))))
    assert {leaf.dtype for leaf in ours.values()} == {jnp.dtype(jnp.float64)}
    assert ours.keys() == expected.keys()
    for path, gradient in ours.items():
        difference = np.linalg.norm(np.asarray(gradient) - np.asarray(expected[path]))
        assert difference <= 1e-6 * np.linalg.norm(expected[path]), path


def test_a_tied_kernel_is_held_once_in_parameters_moments_and_averages() -> None:
    task = classification(create_model("halvit_tiny", **SMALL))
    optimizer = make_optimizer(**default_config().optim, batch_size=8, steps_per_epoch=1, total_steps=100)
    state = flatten(abstract_state(task, optimizer, mesh=make_mesh(), use_ema=True))
    for kernel in ("ffn/tied", "attention/query_output", "attention/key_value"):
        holders = [path.removesuffix(f"/block0/{kernel}/kernel") for path in state if f"block0/{kernel}" in path]
        assert holders == ["ema/params", "opt_state/1/mu", "opt_state/1/nu", "params"]
    assert sum(sorted(leaf.shape) == sorted((D, F)) for leaf in state.values()) == 4 * DEPTH
    assert sum(leaf.shape == (D, D) for leaf in state.values()) == 4 * 2 * DEPTH


def test_the_matrices_of_a_halvits_blocks_are_half_of_a_deits() -> None:
    def matrices(name: str) -> int:
        params = flatten(_params(create_model(name, **SMALL)))
        return sum(leaf.size for path, leaf in params.items() if path.startswith("block") and leaf.ndim == 2)

    assert 2 * matrices("halvit_tiny") == matrices("deit_small") == 12 * D * D * DEPTH


@pytest.mark.parametrize("name", ["deit_tiny", "halvit_tiny"])
def test_every_layer_norm_has_timms_epsilon(name: str) -> None:
    model, epsilons = create_model(name, **SMALL), []

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, nn.LayerNorm) and context.method_name == "__call__":
            epsilons.append(context.module.epsilon)
        return call(*args, **kwargs)

    params = _params(model)
    with nn.intercept_methods(watch):
        jax.eval_shape(lambda p, x: model.apply({"params": p}, x, train=False), params, _images())
    assert epsilons == [1e-6] * (2 * DEPTH + 1)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_features_are_a_map_of_the_image_without_the_class_token(pool: str) -> None:
    model = create_model("halvit_tiny", **SMALL | {"num_classes": 0}, pool=pool)
    params = _params(model)
    assert ("class_token" in params) == (pool == "token")
    features = _apply(model, params, _images(), method="features")
    assert {stride: maps.shape for stride, maps in features.items()} == {8: (2, 2, 2, D)}
    pooled = _apply(model, params, _images())
    means = features[8].mean((1, 2))
    assert np.allclose(pooled, means, atol=1e-6) == (pool == "mean")
    made = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False, method="features"), _images())
    assert made["params"].keys() == params.keys() - {"class_token"}
    assert made["params"]["position"]["embedding"].shape == params["position"]["embedding"].shape


def test_a_distilled_model_answers_with_the_mean_of_its_classifiers() -> None:
    model = create_model("deit_tiny_distilled", **SMALL)
    params, images = _params(model), _images()
    logits, maps = _apply(model, params, images), _apply(model, params, images, method="features")
    assert maps[8].shape == (2, 2, 2, D)
    swapped = params | {"head": params["head_distill"], "head_distill": params["head"]}
    swapped |= {"class_token": params["distill_token"], "distill_token": params["class_token"]}
    position = params["position"]["embedding"]
    swapped |= {"position": {"embedding": np.concatenate([position[1::-1], position[2:]])}}
    np.testing.assert_allclose(_apply(model, swapped, images), logits, atol=1e-5)
    one = params | {"head_distill": jax.tree.map(lambda x: x + 1, params["head_distill"])}
    assert np.abs(_apply(model, one, images) - logits).max() > 0.1
    pooled = _apply(create_model("deit_tiny_distilled", **SMALL | {"num_classes": 0}), params, images)
    assert pooled.shape == (2, D)


def test_the_logits_of_each_classifier_are_available() -> None:
    model = create_model("deit_tiny_distilled", **SMALL)
    params, images = _params(model), _images()
    heads = _apply(model, params, images, method="head_logits")
    assert {name: (a.shape, a.dtype) for name, a in heads.items()} == {
        "class": ((2, CLASSES), jnp.float32),
        "distill": ((2, CLASSES), jnp.float32),
    }
    other = params | {"head_distill": jax.tree.map(lambda x: x + 1, params["head_distill"])}
    changed = _apply(model, other, images, method="head_logits")
    np.testing.assert_array_equal(changed["class"], heads["class"])
    assert np.abs(changed["distill"] - heads["distill"]).max() > 0.1
    np.testing.assert_array_equal(_apply(model, params, images), (heads["class"] + heads["distill"]) / 2)
    seen = _apply(
        create_model("deit_tiny_distilled", **SMALL | {"num_classes": 0}), params, images, method="head_logits"
    )
    for name, head in (("class", "head"), ("distill", "head_distill")):
        expected = seen[name] @ params[head]["kernel"] + params[head]["bias"][None]
        np.testing.assert_allclose(heads[name], expected, atol=1e-5)
    plain = create_model("deit_tiny", **SMALL)
    assert _apply(plain, _params(plain), images, method="head_logits").keys() == {"class"}


def test_the_maps_rows_and_columns_are_the_images() -> None:
    model = create_model("deit_tiny", **SMALL, position="none")
    params, images = _params(model), _images()
    features = _apply(model, params, images, method="features")[8]
    turned = images.reshape(2, 2, 8, 2, 8, 3).transpose(0, 3, 2, 1, 4, 5).reshape(2, 16, 16, 3)  # patches transposed
    np.testing.assert_allclose(
        _apply(model, params, turned, method="features")[8], features.transpose(0, 2, 1, 3), atol=1e-5
    )


def test_each_kind_of_position_gives_other_logits_and_only_learned_ones_are_parameters() -> None:
    logits = {}
    for kind in ("learned", "sincos", "none"):
        model = create_model("deit_tiny", **SMALL, position=kind)
        params = _params(create_model("deit_tiny", **SMALL))
        position = params.pop("position") if kind != "learned" else params["position"]
        assert ("position" in _params(model)) == (kind == "learned")
        assert position["embedding"].shape == (5, D)
        logits[kind] = np.asarray(_apply(model, params, _images()))
    assert np.abs(logits["learned"] - logits["none"]).max() > 1e-3
    assert np.abs(logits["sincos"] - logits["none"]).max() > 1e-3


def test_attention_bias_adds_biases_to_tied_attention_and_takes_them_from_full() -> None:
    with_bias = flatten(_params(create_model("halvit_tiny", **SMALL, attention_bias=True)))
    added = {path for path in with_bias if path.startswith("block0/attention/") and path.endswith("bias")}
    assert added == {f"block0/attention/{name}_bias" for name in ("query", "key", "value", "output")}
    without = flatten(_params(create_model("deit_tiny", **SMALL, attention_bias=False)))
    assert not {path for path in without if path.startswith("block0/attention/") and path.endswith("bias")}


def test_remat_changes_neither_outputs_nor_gradients() -> None:
    results = []
    for remat in (False, True):
        model = create_model("halvit_tiny", **SMALL | {"depth": 2}, drop_path=0.5, remat=remat)

        def loss(params: dict[str, Any], model: VisionTransformer = model) -> jax.Array:
            rngs = {"drop_path": jax.random.key(3)}
            return jnp.sum(jnp.sin(model.apply({"params": params}, _images(), train=True, rngs=rngs)))

        assert count_remats(loss, _params(model)) == 2 * remat  # one in each block
        results.append(flatten(jax.jit(jax.value_and_grad(loss))(_params(model))))
    plain, recomputed = results
    assert plain.keys() == recomputed.keys()
    for path, value in plain.items():
        np.testing.assert_allclose(recomputed[path], value, rtol=1e-4, atol=1e-5, err_msg=path)


def test_drop_path_acts_in_training_only() -> None:
    model, never = (create_model("halvit_tiny", **SMALL | {"depth": 2}, drop_path=rate) for rate in (0.5, 0.0))
    params, images = _params(model), _images(8)

    @jax.jit
    def train(params: dict[str, Any], key: jax.Array) -> jax.Array:
        return model.apply({"params": params}, images, train=True, rngs={"drop_path": key})

    first, again, other = (np.asarray(train(params, jax.random.key(seed))) for seed in (0, 0, 1))
    plain = _apply(never, params, images, train=True)
    np.testing.assert_array_equal(_apply(model, params, images), plain)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != plain).any()


def _variables(model: VisionTransformer) -> dict[str, Any]:
    """With statistics as of a network that was trained, and a signal that keeps its size."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rng = np.random.default_rng(0)

    def values(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5 if name == "scale" else 2.0, leaf.shape).astype(np.float32)
        size = np.sqrt(leaf.shape[0]) if leaf.ndim == 2 else 1.0
        return (rng.standard_normal(leaf.shape) / size).astype(np.float32)

    return jax.tree_util.tree_map_with_path(values, shapes)


@pytest.mark.parametrize("place", ["logits", "maps"])
def test_a_folded_model_answers_as_the_one_it_was(place: str) -> None:
    model = create_model("deit_tiny_hc", **SMALL, hallucinate=place)
    variables = _variables(model)
    folded, fewer = fold(model, variables)
    assert folded.folded
    shapes = jax.eval_shape(lambda: folded.init(jax.random.key(0), _images(), train=False))
    assert jax.tree.map(jnp.shape, fewer) == jax.tree.map(jnp.shape, shapes)
    assert set(fewer["params"]["block0"]["ffn"]["reduce"]) == {"first", "second"}

    def apply(model: VisionTransformer, variables: Any) -> jax.Array:
        return jax.jit(lambda v: model.apply(v, _images(), train=False))(variables)

    expected = apply(model, variables)
    assert float(jnp.abs(apply(folded, fewer) - expected).max() / expected.std()) <= 1e-5
    with pytest.raises(ValueError, match="reduce is folded and cannot be trained"):
        jax.eval_shape(lambda: folded.apply(fewer, _images(), train=True))
    plain = create_model("deit_tiny", **SMALL)
    assert fold(plain, {"params": {}}) == (plain, {"params": {}})  # has nothing to fold


@pytest.mark.parametrize("name", ["deit_small", "halvit_tiny"])
def test_all_heads_real_and_the_whole_rank_are_the_plain_model_bit_for_bit(name: str) -> None:
    plain = create_model(name, **SMALL)
    fields = {"real_heads": 1.0, "hallucinate": "maps", "ffn_rank": 1.0, "ffn_branches": 3}
    same = create_model(name, **SMALL, **fields)
    key = jax.random.key(0)
    (logits, params), (others, theirs) = (
        jax.jit(lambda m=model: m.init_with_output(key, _images(), train=False))() for model in (plain, same)
    )
    assert jax.tree.structure(params) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, params, theirs)
    np.testing.assert_array_equal(logits, others)


def test_each_part_of_hallucinated_and_compact_models_is_a_field() -> None:
    def paths(name: str, **fields: Any) -> set[str]:
        return {re.sub(r"\d", "", path) for path in flatten(_params(create_model(name, **SMALL, **fields)))}

    plain, made = paths("deit_tiny"), {f"block/attention/maps/hallucination/{part}" for part in ("across", "within")}
    compact = {
        f"block/ffn/reduce/{factor}/{part}"
        for factor in ("first", "second")
        for part in ("dense/kernel", "norm/scale", "norm/bias")
    }
    dense = {f"block/ffn/reduce/{part}" for part in ("kernel", "bias")}
    assert paths("deit_tiny_hc") == (plain | made | compact) - dense
    assert paths("deit_tiny_hc", ffn_rank=1.0) == plain | made
    assert paths("deit_tiny_hc", real_heads=1.0) == (plain | compact) - dense
    assert paths("deit_tiny_hc", real_heads=1.0, ffn_rank=1.0) == plain
    assert paths("halvit_tiny_h") == paths("halvit_tiny") | made


@pytest.mark.parametrize("fields", [{}, {"folded": True}, {"ffn_branches": 11}])
def test_every_array_of_a_compact_model_has_a_rule_of_its_shape(fields: dict[str, Any]) -> None:
    model = create_model("deit_tiny_hc", **SMALL, **fields)
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), "float32")
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    assert ("batch_stats" in shapes) != model.folded
    for path, leaf in flatten(shapes).items():
        (spec,) = [spec for pattern, spec in partition_rules(model) if re.search(pattern, path)]
        assert len(spec) in (0, leaf.ndim), path
        assert (spec != ()) == path.endswith("kernel"), path


def test_remat_of_a_compact_model_moves_the_statistics_once() -> None:
    plain, model = (create_model("deit_tiny_hc", **SMALL, remat=remat) for remat in (False, True))
    variables = _variables(model)
    params, stats = variables["params"], variables["batch_stats"]

    def train(params: Any, model: VisionTransformer) -> tuple[jax.Array, Any]:
        given = {"params": params, "batch_stats": stats}
        logits, changed = model.apply(given, _images(), train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(logits)), changed["batch_stats"]

    with conv.xla_convolutions():  # quicker to compile
        loss, once = jax.jit(lambda p: train(p, plain))(params)
        (again, moved), grads = jax.jit(jax.value_and_grad(lambda p: train(p, model), has_aux=True))(params)
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), moved, once)
    assert all(jax.tree.leaves(jax.tree.map(lambda new, old: bool((new != old).any()), moved, stats)))
    assert [path for path, grad in flatten(grads).items() if not bool(jnp.isfinite(grad).all())] == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention": "half"}, "model.attention='half' is not one of full, tied"),
        ({"ffn": "half"}, "model.ffn='half' is not one of dense, tied"),
        ({"pool": "mean", "distilled": True}, "model.distilled=True needs model.pool='token', not 'mean'"),
        ({"pool": "max"}, "model.pool='max' is not one of token, mean"),
        ({"position": "rotary"}, "model.position='rotary' is not one of learned, sincos, none"),
        ({"depth": 0}, "model.depth=0 must be at least 1"),
        ({"num_heads": 5}, "model.num_heads=5 does not divide model.width=384"),
        ({"num_heads": 0}, "model.num_heads=0 does not divide model.width=384"),
        ({"width": 0}, "model.num_heads=6 does not divide model.width=0"),
        ({"patch_size": 15}, "model.patch_size=15 does not divide model.image_size=224"),
        ({"width": 18, "position": "sincos"}, "model.width=18 must be a multiple of 4 when model.position='sincos'"),
        ({"num_classes": -1}, "model.num_classes=-1 must not be negative"),
        ({"num_classes": 2.5}, "model.num_classes=2.5 must be a whole number"),
        ({"num_classes": "10"}, "model.num_classes='10' must be a whole number"),
        ({"width": "48"}, "model.width='48' must be a whole number"),
        ({"image_size": (32, 64)}, "model.image_size=(32, 64) must be a whole number"),
        ({"depth": True}, "model.depth=True must be a whole number"),
        ({"drop_path": "a"}, "model.drop_path='a' must be a number"),
        ({"remat": "yes"}, "model.remat='yes' must be True or False"),
        ({"pool": 3}, "model.pool=3 must be a text"),
        ({"dtype": "float64"}, "dtype='float64' is float32 to JAX unless jax_enable_x64 is set"),
        ({"drop_path": -0.1}, "model.drop_path=-0.1 must not be negative"),
        ({"drop_path": 1.0}, "model.drop_path=1.0 must lie in [0, 1)"),
        ({"real_heads": 0.0}, "model.real_heads=0.0 must lie in (0, 1]"),
        ({"real_heads": 1.5}, "model.real_heads=1.5 must lie in (0, 1]"),
        ({"hallucinate": "values"}, "model.hallucinate='values' is not one of logits, maps"),
        ({"ffn_rank": 0.0, "ffn": "dense"}, "model.ffn_rank=0.0 must lie in (0, 1]"),
        ({"ffn_rank": 2, "ffn": "dense"}, "model.ffn_rank=2 must lie in (0, 1]"),
        ({"ffn_rank": 0.5}, "model.ffn_rank=0.5 needs model.ffn='dense', not 'tied'"),
        ({"ffn_branches": 0}, "model.ffn_branches=0 must be at least 1"),
        ({"ffn_ratio": 0.0}, "model.ffn_ratio=0.0 leaves nothing of model.width=384"),
        ({"dtype": "floaty"}, "dtype='floaty' is not a floating-point type"),
        ({"dtype": "int32"}, "dtype='int32' is not a floating-point type"),
        (
            {"groups": 32},
            "model.groups=32: halvit_tiny has no such field; it has num_classes, image_size, in_channels,",
        ),
    ],
)
def test_impossible_fields_are_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model("halvit_tiny", **overrides)


def test_a_model_of_no_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Dense is in none of models\.FAMILIES"):
        family_of(nn.Dense(3))


def test_an_unknown_model_is_refused_with_the_nearest_names_and_the_command_that_lists_all() -> None:
    with pytest.raises(ValueError, match=r"model\.name='halvit_tiney' is unknown; did you mean 'halvit_tiny'.*summary"):
        create_model("halvit_tiney")


def test_images_of_another_size_are_refused() -> None:
    model = create_model("deit_tiny", **SMALL)
    message = "images of 24x16 for a model built for 16x16; set model.image_size"
    with pytest.raises(ValueError, match=message):
        model.apply({"params": _params(model)}, jnp.zeros((1, 24, 16, 3)), train=False)


def test_an_override_of_none_is_what_the_table_of_sizes_says() -> None:
    assert create_model("halvit_tiny", width=None, attention=None) == create_model("halvit_tiny")
    assert create_model("halvit_tiny", num_classes=0).num_classes == 0
