"""The scripts of launch/ in a copy of the repository, with stubs in the place of what they start."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

ROOT = pathlib.Path(__file__).parents[2]

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


def start_script(
    folder: pathlib.Path, script: str, *arguments: str, codes: str, **environment: str
) -> subprocess.Popen:
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


def run_script(folder: pathlib.Path, script: str, *arguments: str, codes: str, **environment: str) -> tuple[int, str]:
    """The exit code of such a script and what it says."""
    with start_script(folder, script, *arguments, codes=codes, **environment) as started:
        logged = started.communicate(timeout=60)[1]
    return started.returncode, logged


def exit_code_after_sigterm(started: subprocess.Popen, folder: pathlib.Path) -> int:
    """The exit code of such a script that is sent a SIGTERM when its run is at work."""
    with started:
        end = time.monotonic() + 20
        while not any("halvit_jax.main" in line for line in calls(folder)):
            assert time.monotonic() < end, calls(folder)
            time.sleep(0.05)
        time.sleep(0.3)  # until the stub listens
        started.send_signal(signal.SIGTERM)
        return started.wait(20)


def calls(folder: pathlib.Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


FLAGS = ("--config=a.py", "--workdir=a folder")


RUN = "python -m halvit_jax.main --config=a.py --workdir=a folder"


TPU = ("v5", "us-a", "--", *FLAGS)
