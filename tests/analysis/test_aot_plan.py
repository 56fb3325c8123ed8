"""What is compiled for a topology, what it weighs, and whether it fits."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.configs import load
from helpers.plans import EIGHT, GIBIBYTE, OUT_OF_MEMORY, FakeLowered, digits_config, prepared
from helpers.shapes import shallow
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from halvit_jax.analysis import aot_plan
from halvit_jax.models import create_model
from halvit_jax.training.sharding import make_mesh
from halvit_jax.trees import count, variable_shapes


def test_bytes_of_a_sharded_tree() -> None:
    mesh = make_mesh(data=2, fsdp=4)
    split, whole = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P())
    tree = {
        "split": jax.ShapeDtypeStruct((3, 8), jnp.float32, sharding=split),  # 3 x 2 x 4 bytes
        "whole": jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=whole),  # 5 x 2 bytes
        "scalar": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    }
    assert aot_plan.shard_bytes(tree) == 24 + 10 + 4


@pytest.mark.parametrize("fsdp", [1, 2])
def test_bytes_of_a_small_model_are_those_counted_by_hand(fsdp: int) -> None:
    subject = prepared(digits_config(data=-1, fsdp=fsdp))
    width, hidden, depth, tokens, classes = 96, 384, 4, 17, 10
    matrices = depth * (2 * width * width + width * hidden) + width * classes + 2 * 2 * 3 * width
    vectors = depth * (2 * 2 * width + hidden + width) + 2 * width + tokens * width + width + width + classes
    assert count(subject.state.params) == matrices + vectors
    by_hand = 4 * (matrices // fsdp + vectors)
    parts = aot_plan.state_bytes(subject.state)
    assert parts["parameters"] == parts["ema"] == by_hand
    assert 0 <= parts["optimizer"] - 2 * by_hand < 16  # and its counters
    assert parts["other_state"] == 4  # the step
    assert aot_plan.shard_bytes(subject.batch) == 128 // 8 * (8 * 8 * 3 + 4 + 1 + 4)


def test_the_step_is_that_of_images_of_the_training_size() -> None:
    assert prepared(load("resnet:18,v2")).batch["image"].shape == (1024, 176, 176, 3)


def test_auto_computes_in_bfloat16_and_the_given_config_stays() -> None:
    config = digits_config()
    config.compute_dtype = "auto"
    subject = prepared(config)
    assert (config.compute_dtype, subject.config.compute_dtype) == ("auto", "bfloat16")
    assert prepared(digits_config()).config.compute_dtype == "float32"


@pytest.mark.parametrize(
    ("name", "untied"),
    [
        ("halvit_tiny", "deit_small"),
        ("halvit_small", "deit_base"),
        ("halvit_resnet50", "resnet50"),
        ("halvit_resnext101_32x8d", "resnext101_32x8d"),
    ],
)
def test_the_untied_model_has_the_shape_of_the_baseline(name: str, untied: str) -> None:
    model = shallow(name)
    shapes = variable_shapes(model.clone(**aot_plan.untied_fields(model)))["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variable_shapes(shallow(untied))["params"])
    assert aot_plan.untied_fields(create_model(untied)) == {}


@pytest.mark.parametrize(
    ("field", "value", "logged"),
    [
        ("batch_size", 100, "batch_size=100 does not divide"),
        ("mesh.data", 3, "mesh.data=3"),
        ("total_steps", 0, "set one of them above 0"),
        ("data.virtual_shards", 3, "has 2 hosts; make batch_size=128 and data.virtual_shards=3 multiples"),
    ],
)
def test_a_config_that_could_not_run_there_is_refused(
    field: str, value: int, logged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = digits_config()
    config.update_from_flattened_dict({field: value})
    devices: Any = [types.SimpleNamespace(process_index=number // 4) for number in range(8)]  # two hosts
    monkeypatch.setattr("halvit_jax.experiment.build.make_mesh", lambda devices, **sizes: make_mesh(**sizes))
    with pytest.raises(ValueError, match="=") as error:
        aot_plan.prepare(config, EIGHT, devices)
    assert logged in str(error.value)


def test_a_step_fits_up_to_the_usable_memory() -> None:
    fits = aot_plan.compile_for(FakeLowered(temporaries=883), usable_bytes=1000)
    assert fits["fits"]
    sizes = {"arguments": 100, "temporaries": 883, "output": 10, "code": 7, "peak": 1000, "usable": 1000}
    assert fits["memory"] == sizes
    assert fits["compiled_flops"] == 5.0
    assert not aot_plan.compile_for(FakeLowered(temporaries=884), usable_bytes=1000)["fits"]


def test_a_compiler_out_of_memory_reports_how_much_is_needed() -> None:
    report = aot_plan.compile_for(FakeLowered(error=OUT_OF_MEMORY), usable_bytes=16 * GIBIBYTE)
    assert not report["fits"]
    assert report["memory"]["peak"] == 16.5 * GIBIBYTE
    assert report["memory"]["temporaries"] is None
    assert report["compiler"].endswith("HLO module: jit_train_step.")
    silent = aot_plan.compile_for(FakeLowered(error="RESOURCE_EXHAUSTED: no figures"), usable_bytes=1)
    assert silent["memory"]["peak"] is None
    assert not silent["fits"]


def test_other_compiler_errors_are_raised() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        aot_plan.compile_for(FakeLowered(error="INTERNAL: a fault"), usable_bytes=1)


@pytest.mark.parametrize("first", [128, 640, 6400])
def test_the_largest_batch_is_the_largest_that_fits(first: int) -> None:
    """A program of 100 bytes and a little more than one for each row; 64 rows make a step."""
    tried: list[int] = []

    def compiled(size: int) -> dict[str, Any]:
        tried.append(size)
        peak = round(100 + 1.1 * size + 1e-5 * size**2)
        return {"fits": peak <= 1000, "memory": {"peak": peak, "usable": 1000, "code": 10}}

    report = {"batch_size": first, "batch_per_device": first // 8, "accumulate": 1, "bytes": {"state": 90, "batch": 7}}
    assert aot_plan.largest_batch(report | {"groups": []} | compiled(first), compiled) == 768  # of 832 it is 1022
    assert len(set(tried)) <= 1 + aot_plan.MAX_COMPILES
    tried.clear()
    assert (
        aot_plan.largest_batch(
            report | {"groups": [512, 256], "batch_size": 512, "batch_per_device": 64} | compiled(512), compiled
        )
        == 512
    )
    assert not any(size % 512 for size in tried)


def test_no_batch_may_fit() -> None:
    memory = {"peak": 2000, "usable": 1000, "code": 0}
    report = {"batch_size": 64, "batch_per_device": 8, "accumulate": 1, "bytes": {"state": 1990, "batch": 1}}
    report["groups"] = []
    never = {"fits": False, "memory": memory}
    assert aot_plan.largest_batch(report | never, lambda size: never) == 0
    silent = {"fits": False, "memory": memory | {"peak": None}}
    assert aot_plan.largest_batch(report | silent, lambda size: never) == 0
