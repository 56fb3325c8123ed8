"""Right on this device? Reference outputs in float32 and bfloat16; the same bits twice, and after a kill."""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Recorder, arguments

TOLERANCE = 1e-4  # of the reference's standard deviation, in float32 at the highest precision
FIELDS = {"halvit_resnet50": {"num_classes": 0}}  # as its reference was run
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
DRY = ("deit_tiny", "resnet18")


def start_run(workdir: str, *flags: str, xla: str = DETERMINISTIC) -> "subprocess.Popen[str]":
    """A run of digits_run.py in the background."""
    script = pathlib.Path(__file__).with_name("digits_run.py")
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {xla}".strip()}
    command = [sys.executable, str(script), workdir, *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outcome(workdir: str, run: "subprocess.Popen[str]", seconds: float) -> dict[str, Any]:
    """What a run left: its digest and the step it began at, or the end of what it printed."""
    try:
        printed, _ = run.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        run.kill()
        return {"error": "out of time"}
    path = pathlib.Path(workdir) / "trial.json"
    if run.returncode or not path.exists():
        return {"exit": run.returncode, "said": printed[-600:]}
    found = json.loads(path.read_text())
    return {"digest": found["params_sha256"], "began_at": found["began_at"], "eval": found["eval"]}


def repeats(record: Recorder, given: Any, runs: dict[str, "subprocess.Popen[str]"]) -> None:
    """Twice the same run, one killed and resumed, and one without the flag that makes operations deterministic."""

    def left() -> float:
        return given.until - time.time() - 2

    with record.errors("repeat"):
        killed = outcome(f"{given.work}/killed", runs["killed"], left())
        resumed = start_run(f"{given.work}/killed")
        found = {name: outcome(f"{given.work}/{name}", runs[name], left()) for name in ("first", "second")}
        found |= {"killed": killed, "resumed": outcome(f"{given.work}/killed", resumed, left())}
        for name, value in found.items():
            record("repeat", name, value=value)
        digests = {name: each.get("digest") for name, each in found.items()}
        same = digests["first"] is not None and digests["first"] == digests["second"]
        record("repeat", "bitwise_the_same_twice", value=same)
        went_on = found["resumed"].get("began_at") == 10 and killed.get("exit") == -9
        record("repeat", "bitwise_the_same_after_a_kill", value=went_on and digests["resumed"] == digests["first"])


def references(record: Recorder, given: Any) -> None:
    """Largest difference from each reference's output, in its standard deviations."""
    import importlib.util

    from helpers.official import official_shapes

    from halvit_jax.convert import from_torch
    from halvit_jax.models import create_model

    spec = importlib.util.spec_from_file_location("reference_weights", GOLDEN / "reference_weights.py")
    assert spec is not None
    assert spec.loader is not None
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    names = sorted(path.stem for path in GOLDEN.glob("*.json") if "state" in json.loads(path.read_text()))
    names = [name for name in names if not given.dry or name in DRY]
    images = jnp.asarray(weights.image(2, 224, 224).transpose(0, 2, 3, 1))

    def check(name: str, dtype: str) -> dict[str, Any]:
        fields = FIELDS.get(name, {})
        state = {entry: weights.weights(entry, shape) for entry, shape in official_shapes(name).items()}
        variables = from_torch(name, state, **fields)
        model = create_model(name, **fields, dtype=dtype)
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            output = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
        with np.load(GOLDEN / f"{name}.npz") as file:
            expected = file["logits" if "logits" in file else "features"]
        error = np.abs(np.asarray(output, np.float32) - expected).max() / expected.std()
        return {"error": float(error) if np.isfinite(error) else "not finite"} | (
            {"within": bool(error <= TOLERANCE)} if dtype == "float32" else {}
        )

    with concurrent.futures.ThreadPoolExecutor(2 if given.dry else 10) as pool:
        found = {(name, dtype): pool.submit(check, name, dtype) for dtype in ("float32", "bfloat16") for name in names}
        for (name, dtype), future in found.items():
            with record.errors("golden", name, dtype):
                record("golden", name, dtype, value=future.result(timeout=max(0.1, given.until - time.time() - 25)))


def main() -> None:
    given = arguments()
    record = Recorder(given.record)
    runs = {
        "first": start_run(f"{given.work}/first"),
        "second": start_run(f"{given.work}/second"),
        "killed": start_run(f"{given.work}/killed", "--kill"),
    }
    try:
        with record.errors("golden"):
            references(record, given)
        repeats(record, given, runs)
    finally:
        for run in runs.values():
            run.kill()


if __name__ == "__main__":
    main()
