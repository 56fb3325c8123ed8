"""The training step on 8 simulated devices, split in every way, against one device."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import classification

from halvit_jax.analysis.hlo import collectives
from halvit_jax.models import create_model
from halvit_jax.tasks.classification import Classification
from halvit_jax.training.sharding import AXES, BATCH, make_mesh, partition
from halvit_jax.trees import flatten, map_paths

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (2, 1, 4), "all": (2, 2, 2)}
VIT = {"image_size": 16, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2}
RESNET = {"image_size": 32, "depths": (1, 1, 1, 1), "dtype": "float64"}
SHVIT = {
    "image_size": 16,
    "depths": (1, 1),
    "widths": (16, 24),
    "partial_dims": (8, 8),
    "stages": ("i", "s"),
    "stem_strides": (1, 2),
    "dtype": "float64",
}
# In float32 other sums of a BatchNorm flip the ReLUs of units near zero, which moves a gradient by more than rounding.
MODELS = {"halvit_tiny": VIT, "deit_small": VIT, "halvit_resnet50": RESNET, "shvit_s1": SHVIT}
BATCH_SIZE = 16


def _task(name: str) -> Classification:
    model = create_model(name, num_classes=8, **MODELS[name])
    return classification(model)


def _batch(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (BATCH_SIZE, size, size, 3), np.uint8),
        "label": rng.integers(0, 8, BATCH_SIZE).astype(np.int32),
        "mask": np.ones(BATCH_SIZE, bool),
    }


def _mesh(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    return make_mesh(**dict(zip(AXES, shape, strict=True)), devices=jax.devices()[: int(np.prod(shape))])


def _arrays(task: Classification) -> tuple[Any, Any]:
    """Parameters that keep a signal's size and fresh statistics, without compiling an `init`."""
    rng, dtype = np.random.default_rng(1), jnp.dtype(task.model.dtype or "float32")

    def array(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path.endswith(("scale", "var")):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(dtype)
        fan_in = max(int(np.prod(leaf.shape[:-1])), 1)
        return (rng.standard_normal(leaf.shape) / fan_in**0.5).astype(dtype)

    return map_paths(array, jax.eval_shape(task.init, jax.random.key(0)))


@functools.cache
def _step(name: str, shape: tuple[int, ...]) -> tuple[Any, Any, str]:
    """(loss, gradients, new statistics), the gradients as they lie on the devices, and the compiled program."""
    task, mesh = _task(name), _mesh(shape)
    place = functools.partial(partition, rules=task.partition_rules, mesh=mesh)
    params, model_state = (jax.device_put(tree, place(tree)) for tree in _arrays(task))
    batch = jax.device_put(_batch(task.model.image_size), jax.sharding.NamedSharding(mesh, BATCH))

    def loss(params: Any, model_state: Any, batch: Any) -> Any:
        value = task.loss(params, model_state, {}, batch, jax.random.key(0))
        return value.value, value.model_state

    shardings = jax.tree.map(lambda x: x.sharding, params)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=((None, None), shardings))
    compiled = step.lower(params, model_state, batch).compile()
    (value, statistics), grads = compiled(params, model_state, batch)
    whole = {"loss": value, "grads": grads, "statistics": statistics}
    return jax.device_get(whole), grads, compiled.as_text()


@pytest.fixture(autouse=True)
def _float64(name: str) -> Iterator[None]:
    with jax.enable_x64(MODELS[name].get("dtype") == "float64"):
        yield


QUICK = {("halvit_tiny", "all")}  # to compile; others half a minute
CASES = [
    pytest.param(name, mesh, marks=() if (name, mesh) in QUICK else pytest.mark.slow)
    for name in MODELS
    for mesh in MESHES
]


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_sharded_loss_gradients_and_statistics_are_those_of_one_device(name: str, mesh: str) -> None:
    expected, ours = (flatten(_step(name, shape)[0]) for shape in ((1, 1, 1), MESHES[mesh]))
    assert expected.keys() == ours.keys()
    for path, value in expected.items():
        difference = np.linalg.norm(ours[path] - value)
        assert difference <= 1e-5 * max(np.linalg.norm(value), 1e-3), path


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_parameters_are_sharded_and_no_device_sees_the_whole_batch(name: str, mesh: str) -> None:
    _, grads, program = _step(name, MESHES[mesh])
    sizes = dict(zip(AXES, MESHES[mesh], strict=True))
    both = ("tied/kernel", "query_output/kernel", "key_value/kernel", "qkv/kernel", "head/kernel")
    for path, leaf in flatten(grads).items():
        parts = leaf.nbytes // leaf.addressable_shards[0].data.nbytes
        if path.endswith(both):
            assert parts == sizes["fsdp"] * sizes["tensor"], path
        elif path.endswith("kernel"):
            assert parts >= sizes["fsdp"], path
    found = collectives(program)
    assert "all-reduce" in found or "reduce-scatter" in found  # of the gradient
    if sizes["fsdp"] * sizes["tensor"] == 1:
        assert found.keys() == {"all-reduce"}
    else:
        assert "all-gather" in found or sizes["fsdp"] == 1
    size = MODELS[name]["image_size"]
    assert f"[{BATCH_SIZE},{size},{size},3]" not in program
    assert f"[{BATCH_SIZE // (sizes['data'] * sizes['fsdp'])},{size},{size},3]" in program
