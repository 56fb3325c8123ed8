"""Ahead-of-time compile a training step for a TPU topology and report memory, on any x86 Linux machine.

python -m halvit_jax.plan --config=configs/halvit_tiny.py --topology=v5e:4x4 [--config.mesh.fsdp=4] [--json]
python -m halvit_jax.plan --config=configs/halvit_tiny.py --topology=v5e:4x4 --largest_batch

XLA's TPU compiler comes with `pip install "jax[tpu]"` and needs no TPU. It reports the memory of the step on each
device, its traffic to that memory, and the collectives between devices; with --largest_batch also the largest batch
that fits, found by compiling a few more times. Nothing is computed and no data set is read; the number of steps in an
epoch, which only shapes the learning rate, is ImageNet's. Compiling takes minutes.

Exit codes: 0 it fits; 1 it does not; 2 bad input.
"""

import json
import sys
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from halvit_jax.analysis import aot_plan
from halvit_jax.analysis.tpu_topology import parse_topology, tpu_devices
from halvit_jax.cli import app
from halvit_jax.protocols import ExitCode

MEMORY_HINT = (
    "raise loop.accumulate or set model.remat=True if temporaries take most, raise mesh.fsdp if the state does"
)


def define_flags() -> None:
    """Define the command-line flags."""
    config_flags.DEFINE_config_file("config", None, "File of configs/; override with --config.some.field=value.")
    flags.DEFINE_string("topology", None, "Kind and layout of the TPU, e.g. v5e:4x4, v6e:16x16, v4:2x2x4 or v5p:4x4x4.")
    flags.DEFINE_bool("largest_batch", False, "Search for the largest batch that fits; it compiles a few times.")
    flags.DEFINE_bool("json", False, "One JSON object instead of a table.")


def main(argv: list[str]) -> None:
    """Compile, print the report, and exit with its verdict."""
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine stays free for a run that may use it
    values = flags.FLAGS
    with app.report_user_errors():
        app.reject_positional_args(argv, "flags look like --config.batch_size=4096")
        if values.config is None or values.topology is None:
            raise ValueError("give both --config=configs/NAME.py and --topology=v5e:4x4")
        topology = parse_topology(values.topology)
        devices = tpu_devices(topology)
        target = aot_plan.prepare(values.config, topology, devices)
    report = aot_plan.plan(target)
    if values.largest_batch:

        def compiled(batch_size: int) -> dict[str, Any]:
            config = values.config.copy_and_resolve_references()
            config.batch_size = batch_size
            return aot_plan.compile_target(aot_plan.prepare(config, topology, devices))

        report["largest_batch"] = aot_plan.largest_batch(report, compiled)
    print(json.dumps(report) if values.json else table(report), flush=True)
    if not report["fits"]:
        sys.exit(ExitCode.PARTLY)


def table(report: dict[str, Any]) -> str:
    """The report as text, in MiB."""
    memory, parts, untied = report["memory"], report["bytes"], report["untied"]
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    rows = [(name.replace("_", " "), size, untied and untied["bytes"].get(name)) for name, size in parts.items()]
    rows += [(f"{name}, compiled", memory[name], None) for name in ("arguments", "temporaries", "output", "code")]
    rows += [("peak", memory["peak"], None), ("HBM for a program", memory["usable"], None)]
    rows += [("HBM of the chip", memory["hbm"], None)]
    head = f"untied ({untied['parameters']:,} parameters)" if untied else ""
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
        "it fits" if report["fits"] else f"IT DOES NOT FIT: {MEMORY_HINT}",
    ]
    if "largest_batch" in report:
        lines.append(f"largest batch that was compiled and fits: {report['largest_batch']}")
    return "\n".join([*lines, report["compiler"]] if report["compiler"] else lines)


def _roofline(report: dict[str, Any]) -> list[str]:
    """Roofline bound of a step: compute time, memory time and which dominates."""
    products, memory = report["step_s_at_peak"], report["step_s_of_memory"]
    lines = [f"compute: {report['flops'] / 1e12:.2f} TFLOP a step on a device, {1e3 * products:.1f} ms at its peak"]
    if memory is not None:
        moved = f"memory: {report['bytes_moved'] / 1e9:.1f} GB to and from HBM, {1e3 * memory:.1f} ms at its bandwidth"
        binds = "compute-bound" if products >= memory else "memory-bound"
        if report["hbm_bytes"]:
            moved += f"; {report['hbm_bytes'] / 1e9:.1f} GB without what the compiler keeps in VMEM"
        lines += [moved, f"a step takes at least {1e3 * max(products, memory):.1f} ms: {binds}"]
    return lines


def _mebibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.1f}"


if __name__ == "__main__":
    define_flags()
    app.run(main)
