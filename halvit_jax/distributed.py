"""The processes of a run: how they find each other, and what is said when one is missing.

The runtime is JAX's own (`jax.distributed`). A process is called by its rank, 0 to the number of processes - 1; rank 0
is the coordinator.
"""

import contextlib
import json
import os
import pathlib
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

from halvit_jax.protocols import ExitCode
from halvit_jax.text import one_line

FLAGS = ("cluster", "coordinator", "num_processes", "process_id")
SINGLE_PROCESS: Mapping[str, Any] = types.MappingProxyType({})  # the flags of a run of one process
INIT_MARGIN_S = 10  # seconds by which the runtime's own limit is later than ours
COORDINATOR_LINGER_S = 1.0  # seconds by which the coordinator ends later than an error would have it
STATUS_TIMEOUT_S = 6.0  # seconds in which every process answers a roll call
STATUS_KEY = "halvit_jax/collect_status/"
UNKNOWN_STEP = 1 << 60  # the step of one that does not know it


def define_flags() -> None:
    """The flags by which a process finds the others."""
    flags.DEFINE_bool("cluster", False, "Several processes that find each other: TPU pods, SLURM, Kubernetes.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where they are told of each other by hand.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are, with --coordinator.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on, with --coordinator.", lower_bound=0)


@contextlib.contextmanager
def process_group(
    *,
    cluster: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    folder: pathlib.Path | None = None,
    start_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> Iterator[None]:
    """Be one of the processes that the flags speak of; without any, be alone.

    `folder` is one that all of them see; there they say that they have started.

    An error inside ends this process without waiting for the others, after it has said who is missing.

    Raises:
        ValueError: the flags do not fit each other, or the processes did not come together in `start_timeout` seconds.
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
        # That was agreed on, so all come here, and none of them takes the coordinator from the others.
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        line = f"{type(error).__name__}: {one_line(error)}"
        traceback.print_exc()
        print(f"error: {name()}{line}\n{collect_status(line)}", file=sys.stderr, flush=True)
        _exit_now(ExitCode.STALLED)
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def name() -> str:
    """How this process begins a line: "rank 1 of 4: ", or nothing where it is alone."""
    return f"rank {jax.process_index()} of {jax.process_count()}: " if jax.process_count() > 1 else ""


def collect_status(line: str, *, step: int | None = None, waiting: bool = False) -> str:
    """Ask every process where it stands, and say who did not answer and who is behind.

    `step` is how far this process is; `waiting`, whether it does nothing but wait for the others.
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
        time.sleep(COORDINATOR_LINGER_S if is_first() else 0)  # the others read what is kept here
    except Exception as error:  # the coordinator itself may be what is missing
        return f"rank 0, the coordinator, does not answer ({type(error).__name__})"
    lines = [f"  rank {rank}: {answers[rank][2]}" for rank in sorted(answers)]
    silent = [rank for rank in range(jax.process_count()) if rank not in answers]
    if silent:
        lines.append(f"{_ranks(silent)} did not answer within {STATUS_TIMEOUT_S:.0f} s")
    elif step is not None:
        least = min(answer[:2] for answer in answers.values())
        lines.append(f"{_ranks([rank for rank in sorted(answers) if answers[rank][:2] == least])} held the others up")
    return "\n".join(lines)


@contextlib.contextmanager
def status_responder(where: Callable[[], tuple[str, int, bool]]) -> Iterator[None]:
    """A thread that answers the roll calls of others; `where` gives what to say, the step, and whether this process
    waits. One that is well would otherwise not know that it is asked.
    """
    over = threading.Event()

    def listen() -> None:
        while not over.wait(1.0):
            with contextlib.suppress(Exception):  # who works with the coordinator says that it is gone
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
    """{rank: [step, whether it waits, what it says]} of those that have answered."""
    return {int(key.rsplit("/", 1)[-1]): json.loads(value) for key, value in _store().key_value_dir_get(STATUS_KEY)}


def _store() -> Any:
    from jax._src import distributed  # there is no public way to the key-value store of the runtime

    return distributed.global_state.client


def _connect(given: dict, folder: pathlib.Path | None, *, start_timeout: int, heartbeat_timeout: int) -> None:
    """Meet the others. Where they are many, JAX's runtime ends the process without a word of who is missing, so each
    announces itself by a file in the workdir, and this process ends by itself a little earlier.
    """
    announced = _register(folder, given)
    met = threading.Event()

    def give_up() -> None:
        if not met.wait(start_timeout):
            print(f"error: {_missing(folder, given, start_timeout)}", file=sys.stderr, flush=True)
            os._exit(ExitCode.BAD_INPUT)

    threading.Thread(target=give_up, daemon=True).start()
    # CPUs would begin several programs at once, and each process may come to their exchanges in another order.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            coordinator_address=given["coordinator"],
            num_processes=given["num_processes"],
            process_id=given["process_id"],
            initialization_timeout=start_timeout + INIT_MARGIN_S,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=start_timeout,  # for those that end while rank 0 still writes
        )
        jax.devices()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{_missing(folder, given, start_timeout)} ({reason})") from error
    finally:
        met.set()
        if announced is not None:
            announced.unlink(missing_ok=True)


def _register(folder: pathlib.Path | None, given: dict) -> pathlib.Path | None:
    """Say in the workdir that this rank has started; warn where another process says that it is the same."""
    rank = given["process_id"]
    if folder is None or rank is None:
        return None
    print(f"rank {rank} of {given['num_processes']}: looking for the others at {given['coordinator']}", flush=True)
    file = folder / f"starting_{rank}"
    own = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            print(f"WARNING: rank {rank} has also been started as {file.read_text()}", file=sys.stderr, flush=True)
        file.write_text(own)
    except OSError:  # a workdir that cannot be written to is said later
        return None
    return file


def _missing(folder: pathlib.Path | None, given: dict, start_timeout: int) -> str:
    """Who did not come, as far as this process can know."""
    if given["coordinator"] is None:
        return f"the processes did not find each other within cluster.start_timeout={start_timeout} s"
    rank, count = given["process_id"], given["num_processes"]
    since = time.time() - start_timeout - INIT_MARGIN_S
    files = {} if folder is None else {n: folder / f"starting_{n}" for n in range(count)}
    there = [n for n, file in files.items() if file.is_file() and file.stat().st_mtime > since]
    absent = ", ".join(str(n) for n in range(count) if n not in there)
    who = f"only {', '.join(map(str, there))} of the ranks 0 to {count - 1} have started, not {absent}"
    who = who if absent else "all ranks have started, but cannot reach it, or not as they are numbered"
    return (
        f"rank {rank} of {count}: not all met at {given['coordinator']} within cluster.start_timeout={start_timeout} s:"
        f" {who}; start --num_processes={count} processes with the same --coordinator, each with its own --process_id"
    )


def devices() -> str:
    """How many devices this process has of all, and of which kind."""
    return f"{jax.local_device_count()} of the {jax.device_count()} devices ({jax.devices()[0].device_kind})"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {jax.process_count()}"


def _exit_now(code: int) -> NoReturn:
    """End without waiting for the others, as the runtime would at a normal end.

    They are ended by the runtime when the coordinator is gone, hence its moment for those that end by themselves.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(COORDINATOR_LINGER_S if is_first() else 0)
    os._exit(code)
