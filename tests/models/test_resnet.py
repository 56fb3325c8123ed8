import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.jaxprs import count_remats
from helpers.shapes import random_variables
from helpers.tiers import tiered

from halvit_jax.layers import conv
from halvit_jax.layers.drop import DropPath
from halvit_jax.layers.initializers import torch_uniform
from halvit_jax.models import fold
from halvit_jax.models.resnet import KERNEL_INITS, PARTITION_RULES, SIZES, STAGES, Bottleneck, ResNet
from halvit_jax.trees import flatten, variable_shapes

SIZE, CLASSES = 32, 5
TIED = ("halvit_resnet50", "halvit_resnext101_32x8d")
DEFAULT = {"resnet18", "halvit_resnet50"}  # both blocks, tied and not


def _images(b: int = 2, size: int = SIZE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((b, size, size, 3)), jnp.float32)


def _small(name: str, **fields: Any) -> ResNet:
    """The model with few blocks, but one of every kind it has, and with few groups."""
    groups = {"groups": 4, "base_width": 16} if "groups" in SIZES[name] else {}
    small = {"depths": (1, 1, 2, 1) if name in TIED else (2, 1, 1, 1), "num_classes": CLASSES, "image_size": SIZE}
    return ResNet(**SIZES[name] | groups | small | fields)


def _loss_and_gradients(model: ResNet, variables: Any, images: jax.Array) -> tuple[Any, Any]:
    """(loss, (output, new statistics)) and the gradients."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        output, changed = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return _loss(output), (output, changed["batch_stats"])

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def _loss(output: jax.Array) -> jax.Array:
    """Cross-entropy with the labels 0, 1, ... over the first ten outputs."""
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(output[:, :10])))


@pytest.mark.parametrize("name", TIED)
def test_a_stage_owns_one_kernel(name: str) -> None:
    params = flatten(variable_shapes(ResNet(**SIZES[name]))["params"])
    assert [path for path in params if "tied" in path] == ["stage3/tied/kernel", "stage4/tied/kernel"]
    blocks = {path.split("/")[-2] for path in params if re.match(r"stage[34]/block", path)}
    assert blocks == {"norm1", "conv2", "norm2", "norm3"}


def test_paths_are_the_ones_checkpoints_know() -> None:
    params = flatten(variable_shapes(_small("halvit_resnet50"))["params"])
    for path in ("stem/conv/kernel", "stage1/block0/shortcut/norm/scale", "stage3/block0/conv2/kernel", "head/kernel"):
        assert path in params
    rules = [[spec for pattern, spec in PARTITION_RULES if re.search(pattern, path)] for path in params]
    assert all(len(specs) == 1 for specs in rules)
    assert all(len(specs[0]) in (0, a.ndim) for specs, a in zip(rules, params.values(), strict=True))


@pytest.mark.slow
def test_weights_start_as_in_the_released_networks() -> None:
    model = _small("halvit_resnet50", depths=(1, 1, 1, 1))
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles in a fraction of the default's time
    variables = jax.jit(lambda: model.init(key, _images(), train=False))()
    params = flatten(variables["params"])
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert float(params["stage3/tied/kernel"].std()) == pytest.approx((2 / (256 + 1024)) ** 0.5, rel=0.02)
    conv2 = params["stage3/block0/conv2/kernel"]
    assert float(jnp.abs(conv2).max()) <= (9 * 256) ** -0.5
    assert float(conv2.std()) == pytest.approx((9 * 256 * 3) ** -0.5, rel=0.02)
    assert all(bool((a == (1 if path.endswith("scale") else 0)).all()) for path, a in params.items() if "norm" in path)
    zeros = _small("halvit_resnet50", depths=(1, 1, 1, 1), zero_init_residual=True)
    scales = flatten(jax.jit(lambda: zeros.init(key, _images(), train=False))()["params"])
    last = [path for path in scales if path.endswith("norm3/scale")]
    assert len(last) == 4
    assert all(float(jnp.abs(scales[path]).max()) == (path not in last) for path in scales if path.endswith("scale"))
    plain = KERNEL_INITS[ResNet.kernel_init](jax.random.key(0), (3, 3, 8, 256))
    assert float(plain.std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.05)
    assert not any(a.any() for path, a in flatten(variables["batch_stats"]).items() if path.endswith("mean"))


@pytest.mark.parametrize("name", tiered(["resnet18", "resnet50", *TIED], DEFAULT))
def test_drop_path_rises_linearly_to_the_last_block(name: str) -> None:
    model, rates = ResNet(**SIZES[name], drop_path=0.3, num_classes=0), []

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, DropPath) and context.method_name == "__call__":
            rates.append(context.module.rate)
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        variable_shapes(model)
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, sum(model.depths)))


def test_a_dropped_block_is_its_shortcut() -> None:
    block = Bottleneck(8, 2, 1, 0.5, 1, torch_uniform, None, folded=False)
    x = jnp.abs(jnp.asarray(np.random.default_rng(0).standard_normal((32, 4, 4, 8)), jnp.float32))
    variables = jax.jit(lambda: block.init(jax.random.key(0), x, train=False))()
    rngs = {"drop_path": jax.random.key(1)}
    out, _ = block.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])
    dropped = np.asarray((out == x).all((1, 2, 3)))
    assert 0.2 < dropped.mean() < 0.8


@pytest.mark.parametrize("name", tiered(TIED, DEFAULT))
def test_training_moves_every_statistic(name: str) -> None:
    model = _small(name)
    variables = random_variables(model)
    _, changed = jax.jit(lambda v: model.apply(v, _images(4), train=True, mutable=["batch_stats"]))(variables)
    stats = flatten(changed["batch_stats"])
    unmoved = [path for path, old in flatten(variables["batch_stats"]).items() if jnp.array_equal(old, stats[path])]
    assert unmoved == []


@pytest.mark.parametrize("name", tiered(SIZES, DEFAULT))
@pytest.mark.parametrize("size", [64, 40])
def test_features_are_the_maps_of_the_four_stages(name: str, size: int) -> None:
    model = _small(name, num_classes=0)
    variables = variable_shapes(model)
    maps = jax.eval_shape(lambda v: model.apply(v, _images(2, size), train=False, method="features"), variables)
    first = 64 if name == "resnet18" else 256
    sides = {stride: -(-size // stride) for stride in (4, 8, 16, 32)}
    assert {stride: a.shape for stride, a in maps.items()} == {
        stride: (2, side, side, first * 2**i) for i, (stride, side) in enumerate(sides.items())
    }
    pooled = jax.eval_shape(lambda v: model.apply(v, _images(2, size), train=False), variables)
    assert (pooled.shape, pooled.dtype) == ((2, first * 8), jnp.float32)


@pytest.fixture(scope="module")
def step() -> tuple[ResNet, Any, Any]:
    """A small network, its variables, and what its training step gives."""
    model = _small("halvit_resnet50", depths=(1, 1, 1, 1))
    variables = random_variables(model)
    return model, variables, _loss_and_gradients(model, variables, _images(4))


@pytest.mark.slow
def test_bfloat16_trains(step: tuple[ResNet, Any, Any]) -> None:
    exact, variables, ((exact_loss, _), _) = step
    model = exact.clone(dtype="bfloat16")
    (loss, (logits, stats)), grads = _loss_and_gradients(model, variables, _images(4))
    assert logits.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves((grads, stats))} == {jnp.dtype(jnp.float32)}
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves((grads, stats)))
    assert float(loss) == pytest.approx(float(exact_loss), rel=0.05)
    maps = jax.eval_shape(lambda v: model.apply(v, _images(), train=False, method="features"), variables)
    assert {a.dtype for a in maps.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", tiered(SIZES, DEFAULT))
def test_remat_recomputes_each_block(name: str) -> None:
    model, again = _small(name), _small(name, remat=True)
    variables = variable_shapes(model)
    assert jax.tree.map(jnp.shape, variable_shapes(again)) == jax.tree.map(jnp.shape, variables)
    counts = [count_remats(lambda v, m=m: m.apply(v, _images(), train=False), variables) for m in (model, again)]
    assert counts == [0, sum(model.depths)]


@pytest.mark.slow
def test_remat_computes_the_same(step: tuple[ResNet, Any, Any]) -> None:
    model, variables, reference = step
    ours = _loss_and_gradients(model.clone(remat=True), variables, _images(4))
    for (path, a), b in zip(flatten({"all": ours}).items(), jax.tree.leaves({"all": reference}), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()), err_msg=path)


def test_both_formulations_are_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _small("halvit_resnet50")
    variables, images = random_variables(model), _images()
    ours = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    monkeypatch.delitem(conv.CONV_IMPLS, "cpu")
    native = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    np.testing.assert_allclose(ours, native, atol=1e-5 * float(native.std()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": ("bottleneck",) * 3 + ("tied",)}, rf"model.stages='tied' is not one of {', '.join(STAGES)}"),
        ({"kernel_init": "xavier"}, rf"model.kernel_init='xavier' is not one of {', '.join(KERNEL_INITS)}"),
        ({"depths": (2, 2, 2)}, r"model.depths=\(2, 2, 2\) and model.stages=.* must both have four entries"),
        ({"stages": ("basic",) * 5}, r"must both have four entries"),
        ({"drop_path": 1.0}, r"model.drop_path=1.0 must lie in \[0, 1\)"),
        ({"depths": (2, 2, 0, 2)}, r"model.depths=\(2, 2, 0, 2\) must all be at least 1"),
        ({"base_width": 0}, r"model.groups=1 and model.base_width=0 must be at least 1"),
        ({"stages": ("basic",) * 4, "groups": 32}, r"model.groups=32 and model.base_width=64 must be 1 and 64"),
    ],
)
def test_impossible_fields_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**fields)


@pytest.mark.parametrize("name", tiered(SIZES, {"halvit_resnet50"}))
def test_folding_the_norms_changes_no_output(name: str) -> None:
    model, images = _small(name), _images()
    variables = random_variables(model)
    expected = jax.jit(lambda v: model.apply(v, images, train=False))(variables)
    folded, fewer = fold(model, variables)
    assert fewer.keys() == {"params"}
    assert jax.tree.map(jnp.shape, fewer["params"]) == jax.tree.map(jnp.shape, variable_shapes(folded)["params"])
    found = jax.jit(lambda v: folded.apply(v, images, train=False))(fewer)
    assert np.abs(found - expected).max() / expected.std() <= 1e-5
    with pytest.raises(ValueError, match="is folded and cannot be trained"):
        folded.apply(fewer, images, train=True)
    tied = [path for path in flatten(fewer["params"]) if "norm" in path]
    assert bool(tied) == ("halvit" in name)  # only norms around a shared W stay, as scale and bias
