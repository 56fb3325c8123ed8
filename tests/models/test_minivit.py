import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.layers import conv
from halvit_jax.layers.window import MASKED
from halvit_jax.models import create_model
from halvit_jax.trees import count, flatten

pytestmark = pytest.mark.slow  # what every family is held to by default stands in test_contract.py
DEIT = {"width": 16, "depth": 4, "num_heads": 2, "patch_size": 8, "image_size": 32, "num_classes": 5}
SWIN = {"width": 8, "depths": (2,), "head_width": 4, "window_size": 4, "image_size": 32, "num_classes": 5}
SHARED = {  # name -> its small shape, and that of the network whose layers have matrices of their own
    "mini_deit_tiny": (DEIT | {"share": 2}, DEIT | {"share": 1}),
    "mini_swin_tiny": (SWIN | {"shares": (2,)}, SWIN | {"shares": (1,)}),
}
TIED = {"attention": "tied", "ffn": "tied", "attention_bias": False}


def _shapes(name: str, **fields: Any) -> dict[str, Any]:
    model = create_model(name, **fields)
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), "float32")
    return flatten(jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)["params"])


def _values(name: str, **fields: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(leaf.shape) / 3 for path, leaf in _shapes(name, **fields).items()}


def _nest(arrays: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return tree


def _images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 32, 32, 3))


@pytest.mark.parametrize(
    ("share", "counts"),
    [
        (2, (3_090_304, 11_450_824, 44_098_408)),
        (3, (2_202_112, 7_904_968, 29_928_808)),
        (4, (1_758_016, 6_132_040, 22_844_008)),
        (6, (1_313_920, 4_359_112, 15_759_208)),
        (12, (869_824, 2_586_184, 8_674_408)),
    ],
)
def test_all_degrees_of_sharing_have_their_counts(share: int, counts: tuple[int, ...]) -> None:
    for size, wanted in zip(("tiny", "small", "base"), counts, strict=True):
        shapes = _shapes(f"mini_deit_{size}", share=share)
        head = sum(leaf.size for path, leaf in shapes.items() if path.startswith("head"))
        width = shapes["norm/scale"].size
        assert (count(shapes), head) == (wanted, 1000 * width + 1000)
        assert sum(path.endswith("qkv/kernel") for path in shapes) == 12 // share


@pytest.mark.parametrize(
    ("name", "fields", "total"),
    [("mini_deit_base", {}, 44_390_248), ("mini_swin_base", {"window_size": 12}, 46_512_532)],
)
def test_counts_at_384(name: str, fields: dict[str, Any], total: int) -> None:
    shapes = _shapes(name, image_size=384, **fields)
    assert count(shapes) == total


def test_each_stage_of_mini_swin_tiny_has_its_count() -> None:
    shapes = _shapes("mini_swin_tiny")
    # Merging is counted with the stage before it.
    stages = [sum(leaf.size for path, leaf in shapes.items() if f"stage{i}/" in path) for i in (1, 2, 3, 4)]
    merging = [sum(leaf.size for path, leaf in shapes.items() if f"stage{i}/merge" in path) for i in (1, 2, 3, 4)]
    wanted = [197_259, 763_230, 3_088_572, 7_177_272]
    assert [n - own + after for n, own, after in zip(stages, merging, [*merging[1:], 0], strict=True)] == wanted


@pytest.mark.parametrize("name", SHARED)
def test_kernels_can_be_tied_and_shared(name: str) -> None:
    """A dense layer has twelve squares of its width; tying halves them, sharing halves what is left."""

    def matrices(**fields: Any) -> int:
        names = ("qkv/kernel", "output/kernel", "expand/kernel", "reduce/kernel", "tied/kernel", "key_value/kernel")
        shapes = _shapes(name, **fields)
        return sum(leaf.size for path, leaf in shapes.items() if path.endswith(names) and "merge" not in path)

    shared, unshared = SHARED[name]
    squares = 4 * 16**2 if name == "mini_deit_tiny" else 2 * 8**2
    assert matrices(**unshared) == 12 * squares
    assert matrices(**shared) == 6 * squares
    assert matrices(**unshared, **TIED) == 6 * squares
    assert matrices(**shared, **TIED) == 3 * squares


def test_a_mini_halvit_shares_tied_kernels_by_two() -> None:
    shapes = _shapes("mini_halvit_tiny")
    for kernel, shape in {"attention/key_value": (384, 384), "ffn/tied": (384, 1536)}.items():
        found = [leaf.shape for path, leaf in shapes.items() if path.endswith(f"{kernel}/kernel")]
        assert found == 6 * [shape]
    assert not any("qkv" in path or "expand" in path for path in shapes)
    assert _shapes("mini_halvit_small").keys() == shapes.keys()


def test_runs_share_what_hallucinates_and_mix_the_real_heads_before_and_all_after() -> None:
    fields = DEIT | {"num_heads": 4, "depth": 2, "real_heads": 0.5, "remat": True}
    shapes = _shapes("mini_halvit_tiny", **fields)
    made = {path: leaf.shape for path, leaf in shapes.items() if "hallucination" in path}
    folder = "block0/attention/maps/hallucination"
    assert made == {f"{folder}/across": (2, 2), f"{folder}/within": (3, 3, 1, 2)}
    for i in (0, 1):
        assert shapes[f"block0/repeat{i}/mix_logits/kernel"].shape == (2, 2)
        assert shapes[f"block0/repeat{i}/mix_weights/kernel"].shape == (4, 4)
    params = {path: array.astype(np.float32) for path, array in _values("mini_halvit_tiny", **fields).items()}
    model = create_model("mini_halvit_tiny", **fields)
    with conv.xla_convolutions():
        grads = jax.jit(jax.grad(lambda p: model.apply({"params": p}, _images(), train=True).sum()))(_nest(params))
    assert [path for path, grad in flatten(grads).items() if not 0 < float(jnp.abs(grad).max()) < np.inf] == []


def _owner(path: str) -> str:
    """Where the array of a network that shares nothing lies in the one whose layers share by two."""
    number = int(re.search(r"block(\d+)", path)[1]) if "block" in path else 0
    path = re.sub(r"block\d+", f"block{number // 2}", path)
    return path.replace("repeat0", f"repeat{number % 2}")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_the_gradient_of_what_is_shared_is_the_sum_over_its_repeats(name: str, tied: bool) -> None:
    shared, unshared = (fields | (TIED if tied else {}) for fields in SHARED[name])
    values, owners = _values(name, **shared), {path: _owner(path) for path in _shapes(name, **unshared)}
    assert set(owners.values()) == values.keys()
    with jax.enable_x64(True):
        images, weights = jnp.asarray(_images()), np.random.default_rng(2).standard_normal((2, 5))

        def gradients(fields: dict[str, Any], params: dict[str, np.ndarray]) -> dict[str, Any]:
            model = create_model(name, **fields, dtype="float64")

            @jax.jit
            @jax.grad
            def gradient(params: Any) -> jax.Array:
                return jnp.sum(weights * model.apply({"params": params}, images, train=True))

            return {path: np.asarray(array) for path, array in flatten(gradient(_nest(params))).items()}

        with conv.xla_convolutions():  # quicker to compile
            ours = gradients(shared, values)
            single = gradients(unshared, {path: values[owner] for path, owner in owners.items()})
    summed: dict[str, Any] = {}
    for path, gradient in single.items():
        summed[owners[path]] = summed.get(owners[path], 0.0) + gradient
    # What is added to all logits of a head changes nothing: its gradient is rounding alone.
    scale = max(float(np.abs(gradient).max()) for gradient in summed.values())
    for path, gradient in ours.items():
        noise = 1e-9 * scale if path.endswith("mix_logits/bias") else 0.0
        assert gradient.dtype == np.float64
        assert np.linalg.norm(gradient - summed[path]) <= 1e-6 * np.linalg.norm(summed[path]) + noise, path
    assert sum("qkv" in path or "key_value" in path for path in ours if path.endswith("kernel")) == len(
        {owner for owner in owners.values() if owner.endswith(("qkv/kernel", "key_value/kernel"))}
    )


def test_only_released_mini_swins_mask_what_is_not_shifted() -> None:
    """With one run in each stage nothing is shifted, and the mask is all that the two networks differ in."""
    fields = SWIN | {"depths": (1,), "shares": (1,)}
    params = _nest({path: array.astype(np.float32) for path, array in _values("mini_swin_tiny", **fields).items()})
    masked, plain = (create_model("mini_swin_tiny", **fields, mask_unshifted=value) for value in (True, False))
    assert create_model("mini_swin_tiny", **fields) == masked
    images, maps = jnp.asarray(_images(), jnp.float32), {}
    for model in (masked, plain):
        _, state = model.apply({"params": params}, images, train=False, mutable=["intermediates"])
        (maps[model.mask_unshifted],) = state["intermediates"]["stage1"]["block0"]["attention"]["weights"]
    hidden = np.asarray(maps[True] < np.exp(MASKED / 2)).reshape(2, 4, 2, 16, 16)
    assert not (maps[False] < np.exp(MASKED / 2)).any()
    # The window at the upper left has no edge in it; the others are cut into halves, the last one into quarters.
    assert hidden.mean((0, 2, 3, 4)).tolist() == [0.0, 0.5, 0.5, 0.75]


def test_a_class_token_has_a_bucket_of_positions_more() -> None:
    shapes = _shapes("mini_deit_tiny", **DEIT, pool="token")
    assert shapes["block0/repeat1/position/table"].shape == (8, 50)
    assert _shapes("mini_deit_tiny", **DEIT)["block0/repeat1/position/table"].shape == (8, 49)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("mini_deit_tiny", {"share": 5}, "model.share=5 does not divide model.depth=12; change one of them"),
        ("mini_deit_tiny", {"share": 0}, "model.share=0 does not divide model.depth=12; change one of them"),
        ("mini_deit_tiny", {"pool": "max"}, "model.pool='max' is not one of token, mean"),
        ("mini_swin_tiny", {"shares": (2, 2, 4, 2)}, "model.shares=4 does not divide model.depths=6"),
        (
            "mini_swin_tiny",
            {"depths": (2, 2)},
            "model.shares=(2, 2, 6, 2) must have an entry for each stage of model.depths=(2, 2)",
        ),
        ("deit_tiny", {"share": 2}, "model.share=2: deit_tiny has no such field"),
        (
            "mini_deit_tiny",
            {"ffn_rank": 0.5},
            "model.ffn_rank=0.5 must be 1 where layers share matrices (model.share)",
        ),
    ],
)
def test_impossible_fields_are_refused_by_name(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model(name, **overrides)
