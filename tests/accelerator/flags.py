"""What single XLA flags for GPUs do to one model's training step: each in a process of its own."""

import os
import pathlib
import subprocess
import sys
import time

from common import Recorder, arguments, merge

FLAGS = {
    "none": "",
    "latency_hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "triton_gemm_any": "--xla_gpu_triton_gemm_any=true",
    "no_triton_gemm": "--xla_gpu_enable_triton_gemm=false",
    "cublaslt": "--xla_gpu_enable_cublaslt=true",
    "no_command_buffer": "--xla_gpu_enable_command_buffer=",
    "autotune_0": "--xla_gpu_autotune_level=0",
    "autotune_4": "--xla_gpu_autotune_level=4",
    "none again": "",
}
LEAST = 35.0  # seconds that another process needs


def main() -> None:
    given = arguments()
    record = Recorder(given.record)
    script = pathlib.Path(__file__).with_name("jax_speed.py")
    for name, flag in FLAGS.items():
        left = given.until - time.time()
        if left < LEAST and not given.dry:
            record(name, value={"flag": flag, "skipped": "no time left"})
            continue
        file = f"{given.work}/flags_{name.replace(' ', '_')}.part"
        model = given.models.split(",")[0] or "deit_small"
        command = [sys.executable, str(script), "step", f"--record={file}", f"--models={model}"]
        command += [f"--until={given.until}", f"--work={given.work}"] + ["--dry"] * given.dry
        environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
        with record.errors(name):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=max(left, 60))
            rows = merge(file).get("models", {}).get(model, {}).get("train", {})
            row = next(iter(rows.values()), {"error": " ".join(done.stderr.split())[-300:]})
            record(name, value={"flag": flag, **row})
        if given.dry and name == "latency_hiding":
            break


if __name__ == "__main__":
    main()
