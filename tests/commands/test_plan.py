"""The plan of a run on a TPU that is not here, and the scripts that start runs on machines that are not here."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from helpers.processes import run_command
from helpers.shapes import shallow
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from halvit_jax import plan
from halvit_jax.analysis import aot_plan, tpu_topology
from halvit_jax.models import create_model
from halvit_jax.recipes import digits
from halvit_jax.training.sharding import make_mesh
from halvit_jax.trees import count, variable_shapes

ROOT = pathlib.Path(__file__).parents[2]
EIGHT = tpu_topology.Topology("v5e", (2, 4))  # as many chips as there are simulated devices
GIBIBYTE = 2**30


def _config(model: str = "halvit_tiny", **mesh: int) -> ConfigDict:
    config = digits.vit(model)
    config.mesh.update(mesh)
    return config


def _prepared(config: ConfigDict) -> aot_plan.CompileTarget:
    return aot_plan.prepare(config, EIGHT, jax.devices())


# What is compiled, and what it weighs.


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
    subject = _prepared(_config(data=-1, fsdp=fsdp))
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


def test_auto_computes_in_bfloat16_and_the_given_config_stays() -> None:
    config = _config()
    config.compute_dtype = "auto"
    subject = _prepared(config)
    assert (config.compute_dtype, subject.config.compute_dtype) == ("auto", "bfloat16")
    assert _prepared(_config()).config.compute_dtype == "float32"


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
    config = _config()
    config.update_from_flattened_dict({field: value})
    devices: Any = [types.SimpleNamespace(process_index=number // 4) for number in range(8)]  # two hosts
    monkeypatch.setattr("halvit_jax.training.sharding.make_mesh", lambda devices, **sizes: make_mesh(**sizes))
    with pytest.raises(ValueError, match="=") as error:
        aot_plan.prepare(config, EIGHT, devices)
    assert logged in str(error.value)


# What the compiler says.

HLO = "  %gathered = f32[4,32]{1,0} all-gather(f32[4,8]{1,0} %p), dimensions={1}"


class _Lowered:
    """A lowered step that compiles to what the test wants."""

    def __init__(self, *, temporaries: int = 0, error: str = "") -> None:
        self._temporaries, self._error = temporaries, error

    def compile(self) -> Any:
        if self._error:
            raise jax.errors.JaxRuntimeError(self._error)
        sizes = {"argument": 100, "output": 60, "alias": 50, "temp": self._temporaries, "generated_code": 7}
        memory = types.SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
        return types.SimpleNamespace(
            memory_analysis=lambda: memory,
            as_text=lambda: HLO,
            cost_analysis=lambda: {"flops": 5.0, "bytes accessed": 819e6},
        )


OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (16.50G) exceeds available HBM (15.75G). HLO module: jit_train_step.\nSee https://openxla.org"
)


def test_it_fits_up_to_the_memory_for_a_program() -> None:
    fits = aot_plan.compile_for(_Lowered(temporaries=883), usable_bytes=1000)
    assert fits["fits"]
    sizes = {"arguments": 100, "temporaries": 883, "output": 10, "code": 7, "peak": 1000, "usable": 1000}
    assert fits["memory"] == sizes
    assert fits["compiled_flops"] == 5.0
    assert not aot_plan.compile_for(_Lowered(temporaries=884), usable_bytes=1000)["fits"]


def test_a_compiler_that_runs_out_of_memory_says_how_much_is_needed() -> None:
    report = aot_plan.compile_for(_Lowered(error=OUT_OF_MEMORY), usable_bytes=16 * GIBIBYTE)
    assert not report["fits"]
    assert report["memory"]["peak"] == 16.5 * GIBIBYTE
    assert report["memory"]["temporaries"] is None
    assert report["compiler"].endswith("HLO module: jit_train_step.")
    silent = aot_plan.compile_for(_Lowered(error="RESOURCE_EXHAUSTED: no figures"), usable_bytes=1)
    assert silent["memory"]["peak"] is None
    assert not silent["fits"]


def test_other_errors_of_the_compiler_are_not_answered() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        aot_plan.compile_for(_Lowered(error="INTERNAL: a fault"), usable_bytes=1)


@pytest.mark.parametrize("first", [128, 640, 6400])
def test_the_largest_batch_is_the_largest_that_fits(first: int) -> None:
    """A program of 100 bytes and a little more than one for each row; 64 rows make a step."""
    tried: list[int] = []

    def compiled(size: int) -> dict[str, Any]:
        tried.append(size)
        peak = round(100 + 1.1 * size + 1e-5 * size**2)
        return {"fits": peak <= 1000, "memory": {"peak": peak, "usable": 1000, "code": 10}}

    report = {"batch_size": first, "batch_per_device": first // 8, "accumulate": 1, "bytes": {"state": 90, "batch": 7}}
    assert aot_plan.largest_batch(report | compiled(first), compiled) == 768  # of 832 the peak is 1022
    assert len(set(tried)) <= 1 + aot_plan.MAX_COMPILES


def test_there_may_be_no_batch_that_fits() -> None:
    memory = {"peak": 2000, "usable": 1000, "code": 0}
    report = {"batch_size": 64, "batch_per_device": 8, "accumulate": 1, "bytes": {"state": 1990, "batch": 1}}
    never = {"fits": False, "memory": memory}
    assert aot_plan.largest_batch(report | never, lambda size: never) == 0
    silent = {"fits": False, "memory": memory | {"peak": None}}
    assert aot_plan.largest_batch(report | silent, lambda size: never) == 0


def test_the_table_ends_with_the_largest_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot_plan, "largest_batch", lambda report, compiled: compiled(256)["fits"] * 256)
    assert _main(monkeypatch, largest_batch=True) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "largest batch that was compiled and fits: 256"


# The command.


def _main(
    monkeypatch: pytest.MonkeyPatch, *, error: str = "", json_out: bool = False, largest_batch: bool = False
) -> int:
    """The exit code of `main` on the simulated devices, whose compiler is replaced."""
    lowered = _Lowered(temporaries=1, error=error)
    subject = _prepared(_config(fsdp=2))
    monkeypatch.setattr(plan, "tpu_devices", lambda topology: jax.devices())
    monkeypatch.setattr(aot_plan, "prepare", lambda *_: subject._replace(step=_Step(subject.step, lowered)))
    values = types.SimpleNamespace(
        config=subject.config, topology="v5e:2x4", json=json_out, largest_batch=largest_batch
    )
    monkeypatch.setattr(flags, "FLAGS", values)
    try:
        plan.main(["plan"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class _Step:
    """A real step whose lowering is replaced."""

    def __init__(self, step: Any, lowered: _Lowered) -> None:
        self._step, self._lowered = step, lowered

    def __call__(self, *arguments: Any) -> Any:
        return self._step(*arguments)

    def lower(self, *arguments: Any) -> _Lowered:
        return self._lowered


def test_the_report_of_a_run_that_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert _main(monkeypatch, json_out=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert (report["devices"], report["hosts"], report["batch_per_device"]) == (8, 1, 16)
    assert report["untied"]["parameters"] == 451_498  # of configs/vit_digits.py
    assert report["parameters"] == 228_778
    forward = 2 * 16 * 4 * 17 * 12 * 96**2  # of 16 images in 4 blocks: 17 tokens times 12 d^2 weights
    assert 3.0 < report["flops"] / forward < 3.3  # the backward pass costs twice that; attention and ends a little
    assert report["step_s_at_peak"] == report["flops"] / 197e12
    assert report["bytes_moved"] == 819e6
    assert report["step_s_of_memory"] == pytest.approx(1e-3)


def test_the_table_of_a_run_that_fits_and_of_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert _main(monkeypatch) == 0
    logged = capsys.readouterr().out
    assert logged.splitlines()[-1] == "it fits"
    assert "all-gather: 1 in the step" in logged
    assert (
        "memory: 0.8 GB to and from HBM, 1.0 ms at its bandwidth\na step takes at least 1.0 ms: memory binds" in logged
    )
    assert _main(monkeypatch, error=OUT_OF_MEMORY) == 1
    logged = capsys.readouterr().out
    assert "IT DOES NOT FIT" in logged
    assert all(knob in logged for knob in ("mesh.fsdp", "accumulate", "model.remat"))
    assert "16.50G" in logged


@pytest.mark.parametrize(
    ("arguments", "logged"),
    [
        (["--topology=v5e:4x4"], "give both --config"),
        (["--config=configs/halvit_tiny.py"], "give both --config"),
        (["--config=configs/halvit_tiny.py", "--topology=v5e:3x4"], "--topology='v5e:3x4'"),
        (["--config=configs/halvit_tiny.py", "--topology=v5e:4x4", "more"], "unexpected arguments ['more']"),
    ],
)
def test_bad_input_is_answered_with_one_line(arguments: list[str], logged: str) -> None:
    done = run_command("halvit_jax.plan", *arguments, code=2)
    assert logged in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_real_compile_for_a_tpu() -> None:
    pytest.importorskip("libtpu", reason='the TPU compiler is not installed: pip install "jax[tpu]"')
    command = [sys.executable, "-m", "halvit_jax.plan", "--config=configs/halvit_digits.py", "--topology=v5e:2x4"]
    command += ["--config.compute_dtype=auto", "--config.mesh.fsdp=2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"]
    assert report["compute_dtype"] == "bfloat16"
    assert report["memory"]["arguments"] >= sum(report["bytes"].values())  # padded to the tiles of the device
    assert {"all-gather", "all-reduce"} <= set(report["collectives"])


# The scripts that start runs, with stubs in the place of what they start.

STUBS = {
    # What stands in for a run: notes its command and ends with the next of the wanted codes, or waits to be stopped.
    "python": """[ "$2" = pip ] && exit; echo "python $*$XLA_PYTHON_CLIENT_PREALLOCATE" >>"$LOG"; source "$NEXT" """,
    "srun": """echo "srun devices=$JAX_LOCAL_DEVICE_IDS cpus=$SRUN_CPUS_PER_TASK" >>"$LOG"; shift; exec "$@" """,
    "scontrol": """echo "scontrol $*" >>"$LOG" """,
    "nvidia-smi": """echo "$GPU_PIDS" """,
    "git": """printf 'requirements.txt\\0'""",
    "gcloud": """echo "gcloud $*" >>"$LOG"
      case "$*" in *pkill*) touch stop ;; *halvit_jax.main*) source "$NEXT" ;; esac""",
}
NEXT = """code=$(head -n 1 codes); sed -i 1d codes
[ "$code" != wait ] || { trap 'touch stop' TERM; for _ in $(seq 100); do [ -e stop ] && exit 75; sleep 0.1; done; }
exit "${code:-0}"
"""


def _start(folder: pathlib.Path, script: str, *arguments: str, codes: str, **environment: str) -> subprocess.Popen:
    """A script of launch/ in a copy of the repository where all that it calls is a stub."""
    shutil.copytree(ROOT / "launch", folder / "launch")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "bin").mkdir()
    for name, body in STUBS.items():
        path = folder / (".venv/bin" if name == "python" else "bin") / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    files = {"requirements.txt": "", "pyproject.toml": "", "next": NEXT, "codes": codes.replace(" ", "\n") + "\n"}
    for name, text in {**files, "log": ""}.items():
        (folder / name).write_text(text)
    given = {"LOG": str(folder / "log"), "NEXT": str(folder / "next"), "PAUSE": "0", "GPU_PIDS": "", **environment}
    given["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    command = ["bash", str(folder / "launch" / script), *arguments]
    return subprocess.Popen(command, cwd=folder, env=os.environ | given, stderr=subprocess.PIPE, text=True)


def _run(folder: pathlib.Path, script: str, *arguments: str, codes: str, **environment: str) -> tuple[int, str]:
    """The exit code of such a script and what it says."""
    with _start(folder, script, *arguments, codes=codes, **environment) as started:
        logged = started.communicate(timeout=60)[1]
    return started.returncode, logged


def _stopped(started: subprocess.Popen, folder: pathlib.Path) -> int:
    """The exit code of such a script that is sent a SIGTERM when its run is at work."""
    with started:
        end = time.monotonic() + 20
        while not any("halvit_jax.main" in line for line in _log(folder)):
            assert time.monotonic() < end, _log(folder)
            time.sleep(0.05)
        time.sleep(0.3)  # until the stub listens
        started.send_signal(signal.SIGTERM)
        return started.wait(20)


def _log(folder: pathlib.Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


FLAGS = ("--config=a.py", "--workdir=a folder")
RUN = "python -m halvit_jax.main --config=a.py --workdir=a folder"
TPU = ("v5", "us-a", "--", *FLAGS)


@pytest.mark.parametrize(
    ("codes", "ends", "runs"), [("0", 0, 1), ("75 70 0", 0, 3), ("75 2", 2, 2), ("3", 3, 1), ("70 70 70 70", 70, 3)]
)
def test_gpu_starts_again_what_can_go_on(codes: str, ends: int, runs: int, tmp_path: pathlib.Path) -> None:
    assert _run(tmp_path, "gpu.sh", *FLAGS, codes=codes, RESTARTS="2")[0] == ends
    assert _log(tmp_path) == [RUN] * runs


def test_gpu_is_stopped_by_a_signal_for_good(tmp_path: pathlib.Path) -> None:
    assert _stopped(_start(tmp_path, "gpu.sh", *FLAGS, codes="wait 0"), tmp_path) == 75
    assert _log(tmp_path) == [RUN]


def test_gpu_leaves_memory_to_other_processes(tmp_path: pathlib.Path) -> None:
    assert _run(tmp_path / "a", "gpu.sh", *FLAGS, codes="0", GPU_PIDS="123")[0] == 0
    assert _log(tmp_path / "a") == [f"{RUN}false"]
    code, logged = _run(tmp_path / "b", "gpu.sh", codes="0")
    assert code == 2
    assert "usage: " in logged


@pytest.mark.parametrize(
    ("code", "count", "again"), [("0", "0", False), ("75", "0", True), ("70", "4", True), ("75", "100", False)]
)
def test_slurm_queues_again_what_can_go_on(code: str, count: str, again: bool, tmp_path: pathlib.Path) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_RESTART_COUNT": count}
    node = {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16"}
    assert _run(tmp_path, "slurm.sh", *FLAGS, codes=code, **job, **node)[0] == int(code)
    run = RUN.replace("main", "main --cluster")
    assert _log(tmp_path) == ["srun devices=0,1,2,3 cpus=16", run, *["scontrol requeue 7"] * again]


def test_slurm_is_for_sbatch(tmp_path: pathlib.Path) -> None:
    assert "usage, in the root" in _run(tmp_path, "slurm.sh", *FLAGS, codes="0")[1]


def test_tpu_vm_copies_installs_and_starts_again(tmp_path: pathlib.Path) -> None:
    assert _run(tmp_path / "a", "tpu_vm.sh", *TPU, codes="75 70")[0] == 70
    calls = " ".join(_log(tmp_path / "a")).split("gcloud ")[1:]  # one of them has several lines
    assert [call.split()[3] for call in calls] == ["scp", "ssh", "ssh", "ssh"]
    assert all("v5" in call and "--zone=us-a" in call and "--worker=all" in call for call in calls)
    assert "mkdir -p halvit_jax" in calls[1]
    assert calls[2].rstrip().endswith("python -m halvit_jax.main --cluster --config=a.py --workdir=a\\ folder")
    assert "usage: " in _run(tmp_path / "b", "tpu_vm.sh", "v5", "us-a", codes="0")[1]


def test_tpu_vm_is_stopped_by_a_signal_for_good(tmp_path: pathlib.Path) -> None:
    assert _stopped(_start(tmp_path, "tpu_vm.sh", *TPU, codes="wait 0"), tmp_path) == 75
    assert sum("--cluster" in line for line in _log(tmp_path)) == 1
