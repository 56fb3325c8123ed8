"""Everything that must be seen on a GPU, in one sitting of a few minutes: `bash launch/gpu_check.sh`.

A hardware trial, not a test: it measures speed beside PyTorch's, and tries references, bitwise repetition and
resumption on the device. Every part is a process of its own with a budget of seconds; one that fails or overruns is
recorded and the others go on. `gpu_results.json` in --out is written again as results come.

    python tests/accelerator/gpu_check.py --out=DIR [--seconds=480] [--sections=bench,torch] [--models=a,b] [--dry]
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from common import merge

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s of the data sheet


class Section(NamedTuple):
    """One process: its script, the most seconds it may take, and its environment."""

    script: str
    seconds: float
    environment: Mapping[str, str] = types.MappingProxyType({})
    beside: bool = False  # starts, and does not keep the next from starting; it must not use the device


QUICK = "--xla_gpu_autotune_level=2"  # programs are tuned, but not checked while they are
LAZY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
BENCH = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.85", "XLA_FLAGS": QUICK}
CPU = {"JAX_PLATFORMS": "cpu"}
SECTIONS = {  # the most valuable first
    "macs": Section("jax_speed.py", 150, CPU, beside=True),
    "bench": Section("jax_speed.py", 200, BENCH),
    "trials": Section("trials.py", 85, LAZY | {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}),
    "fused": Section("jax_speed.py", 40, LAZY | {"XLA_FLAGS": QUICK}),
    "torch": Section("torch_speed.py", 140),
    "torch_more": Section("torch_speed.py", 140),
    "flags": Section("flags.py", 300, LAZY),
    "more": Section("jax_speed.py", 200, BENCH),  # the second batches
}
DEFAULT = ("macs", "trials", "bench", "fused", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    parser.add_argument("--sections", default=",".join(DEFAULT), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--models", default="", help="of the speed tests; without it all")
    parser.add_argument("--dry", action="store_true", help="small sizes, on the CPU")
    given = parser.parse_args()
    sections = given.sections.split(",")
    slow = 5 if given.dry else 1  # a CPU compiles more slowly, and time is not what is tried there
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(unknown)}")
    out, end = pathlib.Path(given.out), time.time() + given.seconds * slow
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, Any] = {"sections": {}}
        beside: list[tuple[str, subprocess.Popen[bytes], float]] = []
        for name in sections:
            section = SECTIONS[name]
            until = min(end, time.time() + section.seconds * slow)
            if until - time.time() < 10:
                results["sections"][name] = {"skipped": "no time left"}
                continue
            process = start(name, section, given, folder, until)
            if section.beside:
                beside.append((name, process, time.time()))
                continue
            started = time.time()
            while process.poll() is None and time.time() < until:
                time.sleep(0.5)
                write(results, folder, out)
            results["sections"][name] = ended(process, started)
            write(results, folder, out)
        for name, process, started in beside:
            results["sections"][name] = ended(process, started, patience=max(0.0, end - time.time()))
        write(results, folder, out)
    print(table(results))


def start(
    name: str, section: Section, given: argparse.Namespace, folder: str, until: float
) -> "subprocess.Popen[bytes]":
    """The process of a section, in a group of its own; what it prints goes to the end of this one's output."""
    command = [sys.executable, str(HERE / section.script), name, f"--record={folder}/{name}.jsonl", f"--until={until}"]
    command += [f"--models={given.models}", f"--work={folder}"] + ["--dry"] * given.dry
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **section.environment}
    if given.dry:
        environment["JAX_PLATFORMS"] = "cpu"
    print(f"== {name}: until {time.strftime('%H:%M:%S', time.localtime(until))}", flush=True)
    return subprocess.Popen(command, env=environment, start_new_session=True)


def ended(process: "subprocess.Popen[bytes]", started: float, patience: float = 0.0) -> dict[str, Any]:
    """How a section ended; one that still runs is killed with all that it started."""
    try:
        code: int | str = process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        code = "stopped: out of time"
    return {"exit": code, "seconds": round(time.time() - started, 1)}


def write(results: dict[str, Any], folder: str, out: pathlib.Path) -> None:
    """All that is known so far, to gpu_results.json."""
    for path in sorted(pathlib.Path(folder).glob("*.jsonl")):
        results[path.stem] = merge(str(path))
    complete(results)
    temporary = out / "gpu_results.tmp"
    temporary.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    temporary.replace(out / "gpu_results.json")


def complete(results: dict[str, Any]) -> None:
    """Model FLOP utilisation and share of the memory's bandwidth, where everything is known."""
    machine = results.get("bench", {}).get("machine", {})
    peak = next((flops for name, flops in PEAK.items() if name in str(machine.get("device"))), None)
    bandwidth = machine.get("copy_tb_per_s")
    macs = results.get("macs", {})
    for section in ("bench", "more"):
        for name, kinds in results.get(section, {}).get("models", {}).items():
            for kind, batches in kinds.items():
                passes = 3 if kind == "train" else 1
                for row in batches.values() if isinstance(batches, dict) else ():
                    if not isinstance(row, dict) or "images_per_s" not in row:
                        continue
                    each = macs.get(name.split("/")[0], {}).get("macs")
                    if each and peak:
                        row["mfu"] = round(2 * each * passes * row["images_per_s"] / peak, 4)
                    if bandwidth and row.get("bytes_accessed"):
                        row["hbm_share"] = round(row["bytes_accessed"] / row["ms"] / 1e9 / bandwidth, 4)


def table(results: dict[str, Any]) -> str:
    """The speeds side by side, and how every section ended."""
    lines = [f"{'model':<24}{'what':<8}{'batch':>6}{'images/s':>11}{'MFU':>7}{'GiB':>7}   torch eager / compiled"]
    torch = results.get("torch", {}).get("models", {}) or results.get("torch_more", {}).get("models", {})
    for section in ("bench", "more"):
        for name, kinds in results.get(section, {}).get("models", {}).items():
            for kind, batches in kinds.items():
                for batch, row in batches.items() if isinstance(batches, dict) else ():
                    if not isinstance(row, dict) or "images_per_s" not in row:
                        lines.append(f"{name:<24}{kind:<8}{batch:>6} {str(row)[:80]}")
                        continue
                    beside = [torch.get(name.split("/")[0], {}).get(m, {}).get(kind, {}) for m in ("eager", "compiled")]
                    speeds = " / ".join(str(x.get("images_per_s", "-")) for x in beside)
                    lines.append(
                        f"{name:<24}{kind:<8}{batch:>6}{row['images_per_s']:>11,.0f}{row.get('mfu', 0):>7.1%}"
                        f"{row.get('peak_bytes', 0) / 2**30:>7.1f}   {speeds}"
                    )
    for name in ("trials", "fused", "flags"):
        for key, value in results.get(name, {}).items():
            lines.append(f"{name}/{key}: {json.dumps(value)[:600]}")
    lines += [f"{name}: {ending}" for name, ending in results["sections"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
