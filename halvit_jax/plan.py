"""Does a run fit on a TPU that is not here? Compile its real training step for it, on any x86 Linux machine.

python -m halvit_jax.plan --config=configs/halvit_tiny.py --topology=v5e:4x4 [--config.mesh.fsdp=4] [--json]
python -m halvit_jax.plan --config=configs/halvit_tiny.py --topology=v5e:4x4 --largest_batch

XLA's TPU compiler comes with `pip install "jax[tpu]"` and needs no TPU. It says what the step needs on each device,
what it moves between the device and its memory, and what the devices send each other; with --largest_batch also the
largest batch that fits, which is searched for by compiling a few more times. Nothing is computed and no data set is
read; the number of steps in an epoch, which only shapes the learning rate, is ImageNet's. Compiling takes minutes.

Exit codes: 0 it fits; 1 it does not; 2 bad input.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from halvit_jax.analysis.hlo import bytes_named, collectives, memory_of
from halvit_jax.analysis.tpu_topology import Topology, parse_topology, tpu_devices
from halvit_jax.cli import app
from halvit_jax.protocols import PyTree

IMAGENET_IMAGES = 1_281_167
MOST_COMPILED = 5  # further programs in a search
ROWS = 8  # of a batch on a device that a TPU's layouts are made for
KNOBS = (
    "raise loop.accumulate or set model.remat=True where temporaries are the most, raise mesh.fsdp where the state is"
)


def define_flags() -> None:
    """The flags of this door."""
    config_flags.DEFINE_config_file("config", None, "File of configs/; override with --config.some.field=value.")
    flags.DEFINE_string("topology", None, "Kind and layout of the TPU, e.g. v5e:4x4, v6e:16x16, v4:2x2x4 or v5p:4x4x4.")
    flags.DEFINE_bool("largest_batch", False, "Search for the largest batch that fits; it compiles a few times.")
    flags.DEFINE_bool("json", False, "One JSON object instead of a table.")


def main(argv: list[str]) -> None:
    """Compile, print, and exit with what came out."""
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine stays free for the run it may be at
    values = flags.FLAGS
    with app.bad_input():
        app.no_arguments(argv, "flags look like --config.batch_size=4096")
        if values.config is None or values.topology is None:
            raise ValueError("give both --config=configs/NAME.py and --topology=v5e:4x4")
        topology = parse_topology(values.topology)
        devices = tpu_devices(topology)
        subject = prepare(values.config, topology, devices)
    report = plan(subject)
    if values.largest_batch:

        def compiled(batch_size: int) -> dict[str, Any]:
            config = values.config.copy_and_resolve_references()
            config.batch_size = batch_size
            return compile_subject(prepare(config, topology, devices))

        report["largest_batch"] = largest_batch(report, compiled)
    print(json.dumps(report) if values.json else table(report), flush=True)
    if not report["fits"]:
        sys.exit(1)


class Subject(NamedTuple):
    """What is compiled: the step, the shapes and shardings of what it is given, and what the report tells of them."""

    config: ConfigDict
    topology: Topology
    hosts: int
    step: Any
    state: PyTree  # a TrainState of shapes
    frozen: PyTree  # shapes of a teacher, if there is one
    batch: dict[str, jax.ShapeDtypeStruct]
    twin: PyTree | None  # the state of the model's untied twin; None where nothing is tied


def prepare(config: ConfigDict, topology: Topology, devices: list[jax.Device]) -> Subject:
    """The step of a run as `main` would build it on these devices.

    Raises:
        ValueError: fields that are not allowed, do not fit each other, or do not divide over the devices.
    """
    from halvit_jax.experiment import tasks, teacher
    from halvit_jax.training.fault_tolerance.grad_spikes import make_limit
    from halvit_jax.training.optim import make_optimizer
    from halvit_jax.training.sharding import check_batch_size, make_mesh
    from halvit_jax.training.state import abstract_state
    from halvit_jax.training.step import abstract_batch, make_train_step

    config = config.copy_and_resolve_references()
    if config.compute_dtype == "auto":
        config.compute_dtype = "bfloat16"  # what it is on a TPU
    task = tasks.build_task(config)
    use_ema = config.loop.ema_decay > 0
    mesh = make_mesh(**config.mesh, devices=devices)
    if config.task.name == "distillation":
        task = teacher.abstract_task(config, mesh)
    check_batch_size(config.batch_size, mesh, accumulate=config.loop.accumulate)
    hosts = len({device.process_index for device in devices})
    if math.gcd(config.batch_size, config.data.virtual_shards) % hosts:
        raise ValueError(
            f"--topology={topology} has {hosts} hosts; make batch_size={config.batch_size} and "
            f"data.virtual_shards={config.data.virtual_shards} multiples of that"
        )
    # Where the length is given in steps, an epoch of one keeps the warm-up below it whatever the data set.
    epoch = max(IMAGENET_IMAGES // config.batch_size, 1) if config.num_epochs else 1
    length = {"steps_per_epoch": epoch, "total_steps": config.total_steps or config.num_epochs * epoch}
    optimizer = make_optimizer(**config.optim, batch_size=config.batch_size, **length)
    limit = make_limit(**config.skip_updates)
    settings = {"seed": config.seed, "ema_decay": config.loop.ema_decay, "accumulate": config.loop.accumulate}
    step = make_train_step(task, optimizer, **settings, limit=limit)
    batch = abstract_batch(mesh, batch_size=config.batch_size, image_size=task.model.image_size)
    state = abstract_state(task, optimizer, mesh=mesh, use_ema=use_ema, limit=limit)
    twin, fields = None, untied(task.model)
    if fields:
        plain = config.copy_and_resolve_references()
        plain.model.update(fields)
        twin = abstract_state(tasks.build_task(plain), optimizer, mesh=mesh, use_ema=use_ema, limit=limit)
    return Subject(config, topology, hosts, step, state, task.frozen, batch, twin)


def untied(model: Any) -> dict[str, Any]:
    """The fields that make the plain twin of a HaLViT of equal shape; none where nothing is tied."""
    fields: dict[str, Any] = {}
    if getattr(model, "attention", None) == "tied":
        fields |= {"attention": "full", "attention_bias": True}  # biases as DeiT has them
    if getattr(model, "ffn", None) == "tied":
        fields |= {"ffn": "dense"}
    stages = getattr(model, "stages", ())
    if any(stage.startswith("halvit") for stage in stages):
        fields |= {"stages": tuple("bottleneck" if stage.startswith("halvit") else stage for stage in stages)}
    return fields


def plan(subject: Subject) -> dict[str, Any]:
    """Compile, and the report: a dict of plain values, sizes in bytes on one device unless they say otherwise."""
    from halvit_jax.analysis.macs import count_macs
    from halvit_jax.trees import count

    config, topology, state = subject.config, subject.topology, subject.state
    mesh = subject.batch["mask"].sharding.mesh
    flops = 2 * count_macs(subject.step, state, subject.frozen, subject.batch) / mesh.size
    parts = {**state_bytes(state), "batch": shard_bytes(subject.batch)}
    if subject.frozen:
        parts["teacher"] = shard_bytes(subject.frozen)
    report = {
        "model": config.model.name,
        "topology": str(topology),
        "devices": mesh.size,
        "hosts": subject.hosts,
        "mesh": dict(mesh.shape),
        "compute_dtype": config.compute_dtype,
        "batch_size": config.batch_size,
        "batch_per_device": config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"]),
        "accumulate": config.loop.accumulate,
        "remat": config.model.remat,
        "parameters": count(state.params),
        "bytes": parts,
        "flops": flops,
        "step_s_at_peak": flops / topology.chip.peak_flops,
        "twin": subject.twin and {"parameters": count(subject.twin.params), "bytes": state_bytes(subject.twin)},
    }
    report |= compile_subject(subject)
    report["memory"]["hbm"] = topology.chip.hbm_bytes
    moved = report["bytes_moved"]
    report["step_s_of_memory"] = None if moved is None else moved / topology.chip.bandwidth
    return report


def compile_subject(subject: Subject) -> dict[str, Any]:
    """What compiling the subject's step says."""
    lowered = subject.step.lower(subject.state, subject.frozen, subject.batch)
    return compile_for(lowered, usable_bytes=subject.topology.chip.usable_bytes)


def largest_batch(report: dict[str, Any], compiled: Callable[[int], dict[str, Any]]) -> int:
    """The largest batch, in steps of ROWS a device, that was compiled and fits; 0 where none did.

    Memory is taken to grow in proportion to the batch, but for state and program: every guess lies on the line through
    the two batches nearest to the limit, the first of which is that of no rows at all. `compiled(batch_size)` is what
    `compile_for` says of that batch.
    """
    unit = report["batch_size"] // report["batch_per_device"] * report["accumulate"] * ROWS
    usable = report["memory"]["usable"]
    peaks = {0: sum(report["bytes"].values()) - report["bytes"]["batch"] + (report["memory"]["code"] or 0)}
    fits, fails = {0}, set()
    size, found = report["batch_size"], report
    for _ in range(MOST_COMPILED):
        (fits if found["fits"] else fails).add(size)
        if found["memory"]["peak"] is None:  # the compiler does not say how far off it is
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
    """What compiling says: {"fits", "memory" in bytes on a device, "collectives", "compile_s", ...}.

    Where the compiler gives up it names the peak alone, and only that is not None.
    """
    started = time.perf_counter()
    memory: dict[str, int | None] = dict.fromkeys(("arguments", "temporaries", "output", "code"))
    told: dict[str, Any] = {"collectives": None, "compiler": None, "compiled_flops": None, "bytes_moved": None}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fits, memory["peak"] = False, bytes_named(str(error))
        told["compiler"] = str(error).splitlines()[0]
    else:
        sizes = memory_of(compiled)
        memory = {**sizes, "peak": sum(sizes.values())}
        fits = memory["peak"] <= usable_bytes
        told["collectives"] = collectives(compiled.as_text())
        cost = compiled.cost_analysis() or {}
        told["compiled_flops"], told["bytes_moved"] = cost.get("flops"), cost.get("bytes accessed")
    seconds = round(time.perf_counter() - started, 1)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    memory["usable"] = usable_bytes
    return {"fits": fits, "memory": memory, **told, "compile_s": seconds, "host_peak": host}


def state_bytes(state: PyTree) -> dict[str, int]:
    """Bytes of the parts of a TrainState on one device."""
    other = (state.step, state.model_state, state.limit)
    named = {"parameters": state.params, "optimizer": state.opt_state, "ema": state.ema, "other_state": other}
    return {name: shard_bytes(part) for name, part in named.items()}


def shard_bytes(tree: PyTree) -> int:
    """Bytes of a tree of sharded shapes on one device, without the padding of the device's own layouts."""
    shapes = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * itemsize for shape, itemsize in shapes)


def table(report: dict[str, Any]) -> str:
    """The report for people, in MiB."""
    memory, parts, twin = report["memory"], report["bytes"], report["twin"]
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    rows = [(name.replace("_", " "), size, twin and twin["bytes"].get(name)) for name, size in parts.items()]
    rows += [(f"{name}, compiled", memory[name], None) for name in ("arguments", "temporaries", "output", "code")]
    rows += [("peak", memory["peak"], None), ("HBM for a program", memory["usable"], None)]
    rows += [("HBM of the chip", memory["hbm"], None)]
    head = f"untied twin ({twin['parameters']:,} parameters)" if twin else ""
    lines = [
        f"{report['model']}, {report['parameters']:,} parameters, {report['compute_dtype']}, remat={report['remat']}",
        f"{report['topology']}: {report['devices']} devices on {report['hosts']} hosts, mesh {mesh}",
        f"batch {report['batch_size']}, {report['batch_per_device']} a device, accumulate={report['accumulate']}",
        f"{'MiB on a device':<24} {'':>10}  {head}",
    ]
    for name, size, other in rows:
        lines.append(f"  {name:<22} {_mebibytes(size):>10}  {_mebibytes(other) if other else ''}".rstrip())
    for name, row in (report["collectives"] or {}).items():
        lines.append(f"{name}: {row['count']} in the step, {_mebibytes(row['bytes'])} MiB of results on a device")
    lines += [
        *_roofline(report),
        f"compiled in {report['compile_s']} s, with {_mebibytes(report['host_peak'])} MiB of this machine's memory",
        "it fits" if report["fits"] else f"IT DOES NOT FIT: {KNOBS}",
    ]
    if "largest_batch" in report:
        lines.append(f"largest batch that was compiled and fits: {report['largest_batch']}")
    return "\n".join([*lines, report["compiler"]] if report["compiler"] else lines)


def _roofline(report: dict[str, Any]) -> list[str]:
    """What a step takes at least, by its products and by what it moves, and which of them binds."""
    products, memory = report["step_s_at_peak"], report["step_s_of_memory"]
    lines = [f"products: {report['flops'] / 1e12:.2f} TFLOP a step on a device, {1e3 * products:.1f} ms at its peak"]
    if memory is not None:
        moved = f"memory: {report['bytes_moved'] / 1e9:.1f} GB to and from HBM, {1e3 * memory:.1f} ms at its bandwidth"
        binds = "products bind" if products >= memory else "memory binds"
        lines += [moved, f"a step takes at least {1e3 * max(products, memory):.1f} ms: {binds}"]
    return lines


def _mebibytes(size: int | None) -> str:
    return "not said" if size is None else f"{size / 2**20:,.1f}"


if __name__ == "__main__":
    define_flags()
    app.run(main)
