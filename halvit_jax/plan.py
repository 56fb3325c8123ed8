"""Does a run fit on a TPU that is not here? Compile its real training step for it, on any x86 Linux machine.

python -m halvit_jax.plan --config=configs/halvit_tiny.py --topology=v5e:4x4 [--config.mesh.fsdp=4] [--json]

XLA's TPU compiler comes with `pip install "jax[tpu]"` and needs no TPU. It says what the step needs on each device
and what the devices send each other. Nothing is computed and no data set is read; the number of steps in an epoch,
which only shapes the learning rate, is ImageNet's. Compiling takes minutes.

Exit codes: 0 it fits; 1 it does not; 2 bad input.
"""

import importlib.util
import json
import math
import os
import re
import resource
import sys
import time
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from halvit_jax import door
from halvit_jax.compiled import bytes_named, collectives, memory_of
from halvit_jax.protocols import PyTree

GIB = 2**30
IMAGENET_IMAGES = 1_281_167
KNOBS = "raise accumulate or set model.remat=True where temporaries are the most, raise mesh.fsdp where the state is"


class Chip(NamedTuple):
    """One kind of TPU, as its maker states it, except for `usable_bytes`; a device is a chip."""

    hbm_bytes: int
    usable_bytes: int  # of it for a program; what libtpu 0.0.51 names where it refuses one
    peak_flops: float  # floating-point operations per second, bfloat16
    dimensions: int  # of a topology
    most: int  # chips of the largest pod


CHIPS: dict[str, Chip] = {
    "v4": Chip(32 * GIB, int(30.75 * GIB), 275e12, 3, 4096),
    "v5e": Chip(16 * GIB, int(15.75 * GIB), 197e12, 2, 256),
    "v5p": Chip(95 * GIB, int(95.73 * GIB), 459e12, 3, 8960),
    "v6e": Chip(32 * GIB, int(31.24 * GIB), 918e12, 2, 256),
}
TWO_CORES = {"v4", "v5p"}  # on a chip, which the runtime makes one device of; libtpu calls that "megacore"


class Topology(NamedTuple):
    """So many chips of one kind, and how they are laid out."""

    kind: str  # a key of CHIPS
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The figures of its kind."""
        return CHIPS[self.kind]

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"


def define_flags() -> None:
    """The flags of this door."""
    config_flags.DEFINE_config_file("config", None, "File of configs/; override with --config.some.field=value.")
    flags.DEFINE_string("topology", None, "Kind and layout of the TPU, e.g. v5e:4x4, v6e:16x16, v4:2x2x4 or v5p:4x4x4.")
    flags.DEFINE_bool("json", False, "One JSON object instead of a table.")


def main(argv: list[str]) -> None:
    """Compile, print, and exit with what came out."""
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine stays free for the run it may be at
    values = flags.FLAGS
    with door.bad_input():
        door.no_arguments(argv, "flags look like --config.batch_size=4096")
        if values.config is None or values.topology is None:
            raise ValueError("give both --config=configs/NAME.py and --topology=v5e:4x4")
        topology = parse_topology(values.topology)
        subject = prepare(values.config, topology, tpu_devices(topology))
    report = plan(subject)
    print(json.dumps(report) if values.json else table(report), flush=True)
    if not report["fits"]:
        sys.exit(1)


def parse_topology(text: str) -> Topology:
    """`v5e:4x4` -> Topology("v5e", (4, 4)).

    Raises:
        ValueError: not of this form, an unknown kind, or a layout that this kind is not built in.
    """
    kinds = ", ".join(CHIPS)
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if match is None:
        raise ValueError(f"--topology={text!r} must be KIND:LAYOUT, e.g. v5e:4x4 or v4:2x2x4; kinds are {kinds}")
    if match[1] not in CHIPS:
        raise ValueError(f"--topology={text!r}: {match[1]!r} is no kind of TPU known here; kinds are {kinds}")
    topology = Topology(match[1], tuple(map(int, match[2].split("x"))))
    chip, count = topology.chip, math.prod(topology.shape)
    if len(topology.shape) != chip.dimensions:
        example = f"{topology.kind}:{'x'.join(['4'] * chip.dimensions)}"
        raise ValueError(f"--topology={text!r} must have {chip.dimensions} lengths for this kind, e.g. {example}")
    if not 1 <= count <= chip.most:
        raise ValueError(f"--topology={text!r} asks for {count} chips; {topology.kind} has 1 to {chip.most}")
    if any(size > 1 and size % 2 for size in topology.shape):
        raise ValueError(f"--topology={text!r}: every length must be 1 or even, for a host holds 2x2 chips")
    return topology


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """Devices that can be compiled for, and do not exist; four chips make a host.

    Raises:
        ValueError: the compiler is not installed, or does not know this topology.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError('the TPU compiler is not installed; get it with: pip install "jax[tpu]"')
    from jax.experimental.topologies import get_topology_desc

    # Without these libtpu asks the metadata server of a TPU VM, and waits for it, where there is none; and it lets one
    # process at a time in, for there is one TPU, which is not touched here.
    here = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    here["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    for name, value in here.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.kind in TWO_CORES else {}
    options["chips_per_host_bounds"] = (*(min(2, size) for size in topology.shape[:2]), 1)
    try:
        described = get_topology_desc(platform="tpu", topology_name=str(topology), **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={topology}: libtpu refuses it: {str(error).splitlines()[0]}") from error
    return list(described.devices)


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
    from halvit_jax import run as run_lib
    from halvit_jax import teacher
    from halvit_jax.training.health import make_limit
    from halvit_jax.training.optim import make_optimizer
    from halvit_jax.training.sharding import check_batch_size, make_mesh
    from halvit_jax.training.state import abstract_state
    from halvit_jax.training.step import abstract_batch, make_train_step

    config = config.copy_and_resolve_references()
    if config.compute_dtype == "auto":
        config.compute_dtype = "bfloat16"  # what it is on a TPU
    task = run_lib.build_task(config)
    use_ema = config.ema_decay > 0
    mesh = make_mesh(**config.mesh, devices=devices)
    if config.task.name == "distill":
        task = teacher.abstract_task(config, mesh)
    check_batch_size(config.batch_size, mesh, accumulate=config.accumulate)
    hosts = len({device.process_index for device in devices})
    if math.gcd(config.batch_size, config.data.readers) % hosts:
        raise ValueError(
            f"--topology={topology} has {hosts} hosts; make batch_size={config.batch_size} and "
            f"data.readers={config.data.readers} multiples of that"
        )
    # Where the length is given in steps, an epoch of one keeps the warm-up below it whatever the data set.
    epoch = max(IMAGENET_IMAGES // config.batch_size, 1) if config.num_epochs else 1
    length = {"steps_per_epoch": epoch, "total_steps": config.total_steps or config.num_epochs * epoch}
    optimizer = make_optimizer(**config.optim, batch_size=config.batch_size, **length)
    limit = make_limit(**config.spikes)
    settings = {"seed": config.seed, "ema_decay": config.ema_decay, "accumulate": config.accumulate}
    step = make_train_step(task, optimizer, **settings, limit=limit)
    batch = abstract_batch(mesh, batch_size=config.batch_size, image_size=task.model.image_size)
    state = abstract_state(task, optimizer, mesh=mesh, use_ema=use_ema, limit=limit)
    twin, fields = None, untied(task.model)
    if fields:
        plain = config.copy_and_resolve_references()
        plain.model.update(fields)
        twin = abstract_state(run_lib.build_task(plain), optimizer, mesh=mesh, use_ema=use_ema, limit=limit)
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
    from halvit_jax.macs import count_macs
    from halvit_jax.training.paths import count

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
        "accumulate": config.accumulate,
        "remat": config.model.remat,
        "parameters": count(state.params),
        "bytes": parts,
        "flops": flops,
        "step_s_at_peak": flops / topology.chip.peak_flops,
        "twin": subject.twin and {"parameters": count(subject.twin.params), "bytes": state_bytes(subject.twin)},
    }
    lowered = subject.step.lower(state, subject.frozen, subject.batch)
    report |= compile_for(lowered, usable_bytes=topology.chip.usable_bytes)
    report["memory"]["hbm"] = topology.chip.hbm_bytes
    return report


def compile_for(lowered: Any, *, usable_bytes: int) -> dict[str, Any]:
    """What compiling says: {"fits", "memory" in bytes on a device, "collectives", "compile_s", ...}.

    Where the compiler gives up it names the peak alone, and only that is not None.
    """
    started = time.perf_counter()
    memory: dict[str, int | None] = dict.fromkeys(("arguments", "temporaries", "output", "code"))
    told: dict[str, Any] = {"collectives": None, "compiler": None, "compiled_flops": None}
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
        told["compiled_flops"] = (compiled.cost_analysis() or {}).get("flops")
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
        f"products: {report['flops'] / 1e12:.2f} TFLOP a step on a device; at the chip's peak, waiting for nothing, "
        f"{1e3 * report['step_s_at_peak']:.1f} ms",
        f"compiled in {report['compile_s']} s, with {_mebibytes(report['host_peak'])} MiB of this machine's memory",
        "it fits" if report["fits"] else f"IT DOES NOT FIT: {KNOBS}",
    ]
    return "\n".join([*lines, report["compiler"]] if report["compiler"] else lines)


def _mebibytes(size: int | None) -> str:
    return "not said" if size is None else f"{size / 2**20:,.1f}"


if __name__ == "__main__":
    define_flags()
    door.run(main)
