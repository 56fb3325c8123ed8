"""Process group of a run: start-up, and a report of the missing or slow processes after an error.

The runtime is JAX's own (`jax.distributed`). Ranks run from 0 to the number of processes - 1; rank 0 is the
coordinator.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from absl import flags

from halvit_jax import storage
from halvit_jax.protocols import ExitCode
from halvit_jax.storage import Path
from halvit_jax.text import one_line

FLAGS = ("cluster", "coordinator", "num_processes", "process_id")
SINGLE_PROCESS: Mapping[str, Any] = types.MappingProxyType({})  # the flags of a run of one process
INIT_MARGIN_S = 10  # the runtime's own start-up timeout is this much longer than ours
COORDINATOR_LINGER_S = 1.0  # delay before the coordinator exits after an error
STATUS_TIMEOUT_S = 6.0  # for every process to answer `collect_status`
STATUS_KEY = "halvit_jax/collect_status/"
UNKNOWN_STEP = 1 << 60


def define_flags() -> None:
    """Define the flags of `process_group`."""
    flags.DEFINE_bool("cluster", False, "Several processes, detected automatically: TPU pods, SLURM, Kubernetes.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for processes started by hand.")
    flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Rank of this process, from 0, with --coordinator.", lower_bound=0)


@contextlib.contextmanager
def process_group(
    *,
    cluster: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    folder: Path | None = None,
    start_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> Iterator[None]:
    """Join the process group given by the flags; a no-op for a single process.

    Each process registers in `folder`, which all of them share. An error inside logs the missing processes and exits
    without waiting for the others.

    Raises:
        ValueError: inconsistent flags, or the processes did not connect within `start_timeout` seconds.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if not cluster and len(missing) == len(given):
        yield
        return
    if not cluster:
        if missing:
            raise ValueError(
                f"--coordinator, --num_processes and --process_id go together; {', '.join(missing)} missing"
            )
        if not 0 <= int(process_id or 0) < int(num_processes or 0):
            raise ValueError(f"--process_id={process_id} must be below --num_processes={num_processes}")
        if not str(coordinator).rpartition(":")[2].isdigit() or ":" not in str(coordinator):
            raise ValueError(f"--coordinator={coordinator} must be HOST:PORT, the same for all processes")
    _connect(given, folder, start_timeout=start_timeout, heartbeat_timeout=heartbeat_timeout)
    try:
        print(f"{name()}on {socket.gethostname()} with {devices()}", flush=True)
        yield
    except SystemExit as end:
        if end.code != ExitCode.PREEMPTED:
            _exit_now(end.code if isinstance(end.code, int) else 1)
        # All processes agreed on this exit and reach this line, so the shutdown can wait for them.
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        line = f"{type(error).__name__}: {one_line(error)}"
        traceback.print_exc()
        print(f"error: {name()}{line}\n{collect_status(line)}", file=sys.stderr, flush=True)
        _exit_now(ExitCode.STALLED)
    jax.distributed.shutdown()


def is_first() -> bool:
    """True in process 0, which writes the files of the whole run."""
    return jax.process_index() == 0


def name() -> str:
    """Prefix of a log line: "rank 1 of 4: ", or "" for a single process."""
    return f"rank {jax.process_index()} of {jax.process_count()}: " if jax.process_count() > 1 else ""


def collect_status(line: str, *, step: int | None = None, waiting: bool = False) -> str:
    """The status lines of all processes, and the ranks that did not answer or are behind.

    `step` is the step of this process; `waiting` is True if it only waits for the others.
    """
    if jax.process_count() == 1:
        return ""
    answers: dict[int, list] = {}
    try:
        _answer(line, step if step is not None else UNKNOWN_STEP, waiting)
        end = time.monotonic() + STATUS_TIMEOUT_S
        while len(answers) < jax.process_count() and time.monotonic() < end:
            time.sleep(0.2)
            answers = _answers()
        time.sleep(COORDINATOR_LINGER_S if is_first() else 0)  # the others read from its key-value store
    except Exception as error:  # the coordinator itself may be missing
        return f"rank 0, the coordinator, does not answer ({type(error).__name__})"
    lines = [f"  rank {rank}: {answers[rank][2]}" for rank in sorted(answers)]
    silent = [rank for rank in range(jax.process_count()) if rank not in answers]
    if silent:
        lines.append(f"{_ranks(silent)} did not answer within {STATUS_TIMEOUT_S:.0f} s")
    elif step is not None:
        least = min(answer[:2] for answer in answers.values())
        lines.append(f"{_ranks([rank for rank in sorted(answers) if answers[rank][:2] == least])} delayed the others")
    return "\n".join(lines)


@contextlib.contextmanager
def status_responder(where: Callable[[], tuple[str, int, bool]]) -> Iterator[None]:
    """Answer `collect_status` of other processes in a thread. `where()` is (status line, step, waiting)."""
    over = threading.Event()

    def listen() -> None:
        while not over.wait(1.0):
            with contextlib.suppress(Exception):  # the main thread reports a lost coordinator
                if _answers().keys() - {jax.process_index()}:
                    _answer(*where())
                    return

    thread = threading.Thread(target=listen, name="status_responder", daemon=True)
    if jax.process_count() > 1:
        thread.start()
    try:
        yield
    finally:
        over.set()


def _answer(line: str, step: int, waiting: bool) -> None:
    own = json.dumps([step, waiting, line])
    _store().key_value_set(f"{STATUS_KEY}{jax.process_index()}", own, allow_overwrite=True)


def _answers() -> dict[int, list]:
    """{rank: [step, waiting, status line]} of the processes that have answered."""
    return {int(key.rsplit("/", 1)[-1]): json.loads(value) for key, value in _store().key_value_dir_get(STATUS_KEY)}


def _store() -> Any:
    from jax._src import distributed  # the runtime's key-value store has no public interface

    return distributed.global_state.client


def _connect(given: dict, folder: Path | None, *, start_timeout: int, heartbeat_timeout: int) -> None:
    """Connect to the other processes.

    JAX's runtime times out without naming the missing processes. So each registers by a file in the workdir, and this
    process exits with a message just before the runtime would.
    """
    registered = _register(folder, given)
    connected = threading.Event()

    def give_up() -> None:
        if not connected.wait(start_timeout):
            print(f"error: {_missing(folder, given, start_timeout)}", file=sys.stderr, flush=True)
            os._exit(ExitCode.BAD_INPUT)

    threading.Thread(target=give_up, daemon=True).start()
    # With asynchronous dispatch a CPU runs several programs at once, and the order of their collectives may differ
    # between processes.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            coordinator_address=given["coordinator"],
            num_processes=given["num_processes"],
            process_id=given["process_id"],
            initialization_timeout=start_timeout + INIT_MARGIN_S,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=start_timeout,  # the others wait here while rank 0 still writes
        )
        jax.devices()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{_missing(folder, given, start_timeout)} ({reason})") from error
    finally:
        connected.set()
        if registered is not None:
            registered.unlink(missing_ok=True)


def _register(folder: Path | None, given: dict) -> Path | None:
    """Write a file for this rank to the workdir; warn if another process has the same rank."""
    rank = given["process_id"]
    if folder is None or rank is None:
        return None
    print(f"rank {rank} of {given['num_processes']}: connecting to {given['coordinator']}", flush=True)
    file = folder / f"starting_{rank}"
    own = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            print(f"WARNING: rank {rank} has also been started as {file.read_text()}", file=sys.stderr, flush=True)
        file.write_text(own)
    except OSError:  # a workdir that is not writable is reported later
        return None
    return file


def _missing(folder: Path | None, given: dict, start_timeout: int) -> str:
    """Error message that names the ranks known not to have started."""
    if given["coordinator"] is None:
        return f"the processes did not connect within cluster.start_timeout={start_timeout} s"
    rank, count = given["process_id"], given["num_processes"]
    since = time.time() - start_timeout - INIT_MARGIN_S
    files = {} if folder is None else {n: folder / f"starting_{n}" for n in range(count)}
    there = [n for n, file in files.items() if file.is_file() and storage.written_at(file) > since]
    absent = ", ".join(str(n) for n in range(count) if n not in there)
    who = f"only {', '.join(map(str, there))} of the ranks 0 to {count - 1} have started, not {absent}"
    who = who if absent else "all ranks have started, but cannot reach it, or their ranks are not unique"
    return (
        f"rank {rank} of {count}: not all processes connected to {given['coordinator']} within "
        f"cluster.start_timeout={start_timeout} s: {who}; start --num_processes={count} "
        "processes with the same --coordinator, each with its own --process_id"
    )


def devices() -> str:
    """Number and kind of this process's devices."""
    return f"{jax.local_device_count()} of the {jax.device_count()} devices ({jax.devices()[0].device_kind})"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {jax.process_count()}"


def _exit_now(code: int) -> NoReturn:
    """Exit without the runtime's wait for the other processes.

    The runtime kills them once the coordinator is gone, so the coordinator first gives them time to exit by themselves.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(COORDINATOR_LINGER_S if is_first() else 0)
    os._exit(code)
