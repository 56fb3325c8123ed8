"""Ahead-of-time compile of a training step for a TPU topology: memory, traffic, and the largest batch that fits.

The functions behind the command `plan`.
"""

import math
import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from halvit_jax.analysis.hlo import bytes_named, collectives, hbm_bytes, memory_of
from halvit_jax.analysis.macs import count_macs
from halvit_jax.analysis.tpu_topology import Topology
from halvit_jax.experiment import build, tasks, teacher
from halvit_jax.protocols import PyTree
from halvit_jax.training.step import abstract_batch
from halvit_jax.trees import count

IMAGENET_IMAGES = 1_281_167
MAX_COMPILES = 5  # further programs in a search
ROW_MULTIPLE = 8  # of a batch on a device, because a TPU's layouts have 8 rows


class CompileTarget(NamedTuple):
    """The step to compile, and shapes and shardings of its inputs."""

    config: ConfigDict
    topology: Topology
    hosts: int
    step: Any
    state: PyTree  # a TrainState of shapes
    constants: PyTree  # shapes of a teacher, if there is one
    batch: dict[str, jax.ShapeDtypeStruct]
    untied: PyTree | None  # the state of the untied model of equal shape; None if nothing is tied


def prepare(config: ConfigDict, topology: Topology, devices: list[jax.Device]) -> CompileTarget:
    """The step of a run as `main` would build it on these devices.

    Raises:
        ValueError: fields that are not allowed, do not fit each other, or do not divide over the devices.
    """
    config = config.copy_and_resolve_references()
    if config.compute_dtype == "auto":
        config.compute_dtype = "bfloat16"  # as on a TPU
    task = tasks.build_task(config)
    mesh = build.build_mesh(config, devices=devices)
    if teacher.is_used(config):
        task = teacher.abstract_distillation(config, mesh)
    hosts = len({device.process_index for device in devices})
    if math.gcd(config.batch_size, config.data.virtual_shards) % hosts:
        raise ValueError(
            f"--topology={topology} has {hosts} hosts; make batch_size={config.batch_size} and "
            f"data.virtual_shards={config.data.virtual_shards} multiples of that"
        )
    # For a length in steps, an epoch of one step keeps the warm-up shorter than the run.
    epoch = max(IMAGENET_IMAGES // config.batch_size, 1) if config.num_epochs else 1
    optimizer = build.build_optimizer(config, steps_per_epoch=epoch)
    state = build.build_abstract_state(config, task, optimizer, mesh)
    untied, fields = None, untied_fields(getattr(task, "model", None))
    if fields:
        other = config.copy_and_resolve_references()
        other.model.update(fields)
        untied = build.build_abstract_state(other, tasks.build_task(other), optimizer, mesh)
    return CompileTarget(
        config=config,
        topology=topology,
        hosts=hosts,
        step=build.build_train_step(config, task, optimizer),
        state=state,
        constants=task.constants,
        batch=abstract_batch(mesh, build.training_spec(config, task), batch_size=config.batch_size),
        untied=untied,
    )


def untied_fields(model: Any) -> dict[str, Any]:
    """Overrides that make a HaLViT the untied model of equal shape; {} if nothing is tied."""
    fields: dict[str, Any] = {}
    model = getattr(model, "backbone", model)
    if getattr(model, "attention", None) == "tied":
        fields |= {"attention": "full", "attention_bias": True}  # biases as in DeiT
    if getattr(model, "ffn", None) == "tied":
        fields |= {"ffn": "dense"}
    stages = getattr(model, "stages", ())
    if any(stage.startswith("halvit") for stage in stages):
        fields |= {"stages": tuple("bottleneck" if stage.startswith("halvit") else stage for stage in stages)}
    return fields


def plan(target: CompileTarget) -> dict[str, Any]:
    """Compile, and report in plain values: sizes in bytes on one device unless their names differ."""
    config, topology, state = target.config, target.topology, target.state
    mesh = target.batch["mask"].sharding.mesh
    flops = 2 * count_macs(target.step, state, target.constants, target.batch) / mesh.size
    parts = {**state_bytes(state), "batch": shard_bytes(target.batch)}
    if target.constants:
        parts["constants"] = shard_bytes(target.constants)
    report = {
        "model": tasks.model_name(config),
        "topology": str(topology),
        "devices": mesh.size,
        "hosts": target.hosts,
        "mesh": dict(mesh.shape),
        "compute_dtype": config.compute_dtype,
        "batch_size": config.batch_size,
        "batch_per_device": config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"]),
        "accumulate": config.loop.accumulate,
        "groups": [size for size in (config.classification.mix_group, config.classification.norm_group) if size],
        "remat": config.model.remat,
        "parameters": count(state.params),
        "bytes": parts,
        "flops": flops,
        "step_s_at_peak": flops / topology.chip.peak_flops,
        "untied": target.untied and {"parameters": count(target.untied.params), "bytes": state_bytes(target.untied)},
    }
    report |= compile_target(target)
    report["memory"]["hbm"] = topology.chip.hbm_bytes
    moved = report["bytes_moved"]
    report["step_s_of_memory"] = None if moved is None else moved / topology.chip.bandwidth
    return report


def compile_target(target: CompileTarget) -> dict[str, Any]:
    """The report of `compile_for` on the target's step."""
    lowered = target.step.lower(target.state, target.constants, target.batch)
    return compile_for(lowered, usable_bytes=target.topology.chip.usable_bytes)


def largest_batch(report: dict[str, Any], compiled: Callable[[int], dict[str, Any]]) -> int:
    """The largest batch that was compiled and fits, in steps of ROW_MULTIPLE a device and of groups; 0 if none did.

    Memory is assumed linear in the batch: every guess lies on the line through the two batches nearest to the limit; at
    first, one of them is the empty batch. `compiled(batch_size)` is the report of `compile_for` on that batch.
    """
    devices = report["batch_size"] // report["batch_per_device"]
    unit = report["accumulate"] * math.lcm(devices * ROW_MULTIPLE, *report["groups"])
    usable = report["memory"]["usable"]
    peaks = {0: sum(report["bytes"].values()) - report["bytes"]["batch"] + (report["memory"]["code"] or 0)}
    fits, fails = {0}, set()
    size, found = report["batch_size"], report
    for _ in range(MAX_COMPILES):
        (fits if found["fits"] else fails).add(size)
        if found["memory"]["peak"] is None:  # not reported by the compiler
            break
        peaks[size] = found["memory"]["peak"]
        near, other = sorted(peaks, key=lambda size: abs(peaks[size] - usable))[:2]
        guess = near + (usable - peaks[near]) * (near - other) / (peaks[near] - peaks[other])
        least, most = max(fits) // unit + 1, (min(fails, default=math.inf) - 1) // unit
        size = unit * int(min(max(guess // unit, least), most))
        if size in fits or least > most:
            break
        found = compiled(size)
    else:
        fits |= {size} if found["fits"] else set()
    return max(fits)


def compile_for(lowered: Any, *, usable_bytes: int) -> dict[str, Any]:
    """Compile and report: {"fits", "memory" in bytes on a device, "collectives", "compile_s", ...}.

    If it does not fit, the compiler may report the peak only; the rest is then None.
    """
    started = time.perf_counter()
    memory: dict[str, int | None] = dict.fromkeys(("arguments", "temporaries", "output", "code"))
    stats: dict[str, Any] = {
        "collectives": None,
        "compiler": None,
        "compiled_flops": None,
        "bytes_moved": None,
        "hbm_bytes": None,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fits, memory["peak"] = False, bytes_named(str(error))
        stats["compiler"] = str(error).splitlines()[0]
    else:
        sizes = memory_of(compiled)
        memory = {**sizes, "peak": sum(sizes.values())}
        fits = memory["peak"] <= usable_bytes
        text = compiled.as_text()
        stats["collectives"], stats["hbm_bytes"] = collectives(text), hbm_bytes(text)
        cost = compiled.cost_analysis() or {}
        stats["compiled_flops"], stats["bytes_moved"] = cost.get("flops"), cost.get("bytes accessed")
    seconds = round(time.perf_counter() - started, 1)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    memory["usable"] = usable_bytes
    return {"fits": fits, "memory": memory, **stats, "compile_s": seconds, "host_peak": host}


def state_bytes(state: PyTree) -> dict[str, int]:
    """Bytes of the parts of a TrainState on one device."""
    other = (state.step, state.model_state, state.grad_spikes)
    named = {"parameters": state.params, "optimizer": state.opt_state, "ema": state.ema, "other_state": other}
    return {name: shard_bytes(part) for name, part in named.items()}


def shard_bytes(tree: PyTree) -> int:
    """Bytes of a tree of sharded shapes on one device, without the padding of the device's own layouts."""
    shapes = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * itemsize for shape, itemsize in shapes)
