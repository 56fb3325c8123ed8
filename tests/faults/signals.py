"""SIGTERM and SIGINT at moments from the start of a run to its end: never a traceback, always an exit code that fits.

python tests/faults/signals.py [--trials=20] [--moments=20] [--resume_every=1]

A whole run is timed first; then each trial starts the same command and sends a signal after a part of that time. The
first trial of a moment, or of every so many moments, is started again to its end. Allowed are 75 with a line that names
the signal, and 0 where the run had ended; the resumed run ends with the parameters of the whole one. A process that has
not yet started Python's signal handling may die of the signal in its first tenth of a second, before it has read a file
of this project.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
STARTING = 0.15  # seconds in which Python itself starts
FLAGS = [
    "--config=configs/halvit_digits.py",
    "--config.model.width=24",
    "--config.model.depth=1",
    "--config.total_steps=60",
    "--config.optim.warmup_epochs=0.0",
    "--config.loop.eval_every=20",
    "--config.loop.checkpoint_every=20",
]


def command(workdir: pathlib.Path, cache: pathlib.Path) -> list[str]:
    """The run, small, with compiled programs kept between trials."""
    return [
        sys.executable,
        "-m",
        "halvit_jax.main",
        *FLAGS,
        f"--workdir={workdir}",
        f"--config.compilation_cache={cache}",
    ]


def trial(words: list[str], number: signal.Signals, delay: float) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a run that gets a signal after so many seconds."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, error = process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def judge(code: int, out: str, error: str, number: signal.Signals, delay: float) -> str:
    """What is wrong with an end, "" if nothing is."""
    if "Traceback" in error:
        return f"traceback: {error[-300:]}"
    if code == 75 and f"stopped by {number.name}" in out:
        return ""
    if code == 0 or (code == -number and delay < STARTING):
        return ""
    return f"exit code {code}: {out[-200:]} {error[-200:]}"


def main() -> None:
    """Run all trials, print a line for each that failed, and exit with 1 if there was one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--resume_every", type=int, default=1)
    given = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp())
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in ("first", "whole"):  # the first one compiles
        started = time.monotonic()
        subprocess.run(command(folder / name, folder / "cache"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        length = time.monotonic() - started
    wanted = json.loads((folder / "whole/result.json").read_text())["params_sha256"]
    failures, ends = 0, {}
    for moment in range(given.moments):
        for number in (signal.SIGTERM, signal.SIGINT):
            for attempt in range(given.trials):
                workdir = folder / "run"
                shutil.rmtree(workdir, ignore_errors=True)
                delay = length * (moment + attempt / given.trials) / given.moments
                words = command(workdir, folder / "cache")
                code, out, error = trial(words, number, delay)
                problem = judge(code, out, error, number, delay)
                if not problem and attempt == 0 and moment % given.resume_every == 0:
                    again, out, error = trial(words, number, 600.0)
                    found = json.loads((workdir / "result.json").read_text())["params_sha256"]
                    problem = "" if (again, found) == (0, wanted) else f"resumed: {again}, {found[:8]}; {error[-200:]}"
                ends[code] = ends.get(code, 0) + 1
                if problem:
                    failures += 1
                    print(f"{number.name} after {delay:.2f} of {length:.2f} s: {problem}", flush=True)
        print(f"moment {moment + 1} of {given.moments}: exit codes so far {ends}, {failures} failures", flush=True)
    print(f"{sum(ends.values())} trials, exit codes {ends}, {failures} failures", flush=True)
    shutil.rmtree(folder)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
