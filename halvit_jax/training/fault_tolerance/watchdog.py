"""Kill a stalled run and dump all thread stacks.

A pod that hangs costs as much as one that works. The loop announces each phase (`heartbeat`); when a phase lasts longer
than its timeout, the stacks of all threads are written and the process ends, so that its launcher can restart it.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from halvit_jax.buckets import BucketPath
from halvit_jax.protocols import ExitCode
from halvit_jax.storage import Path

COMPILING, TRAINING = "compiling", "training"


class Watchdog:
    """Ends the process without a `heartbeat` for `timeout` seconds (`compile_timeout` in the phase COMPILING).

    `diagnose_peers(line, step=, waiting=)` reports on the other processes before the end; it has ten seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        timeout: float,
        compile_timeout: float,
        name: str = "",
        diagnose_peers: Callable[..., str] = lambda line, *, step, waiting: "",
    ) -> None:
        self._folder, self._timeout, self._compile_timeout = folder, timeout, compile_timeout
        self._name, self._diagnose_peers = name, diagnose_peers
        self._phase, self._step, self._since = "starting", 0, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self._since = time.monotonic()
        self._thread.start()

    def heartbeat(self, phase: str, step: int) -> None:
        """Announce a phase of the run, after this step."""
        self._phase, self._step, self._since = phase, step, time.monotonic()

    def status(self) -> tuple[str, int, bool]:
        """The phase in words, the step, and whether the process only waits for others."""
        waiting = self._phase == TRAINING  # within a step, a process waits for the others only
        return f"in phase {self._phase!r} after step {self._step}", self._step, waiting

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = min(self._timeout, self._compile_timeout) / 20
        while not self._over.wait(min(pause, 1.0)):
            allowed = self._compile_timeout if self._phase == COMPILING else self._timeout
            waited = time.monotonic() - self._since
            if waited > allowed:
                self._end(f"no progress for {waited:.0f} s {self.status()[0]}")

    def _end(self, line: str) -> None:
        line = f"{self._name}{line}"
        print(f"error: {line}; the stacks of all threads follow", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._write_stacks(line)
        asking = threading.Thread(target=self._ask, args=(line,), daemon=True)
        asking.start()
        asking.join(10.0)
        os._exit(ExitCode.STALLED)

    def _write_stacks(self, line: str) -> None:
        if isinstance(self._folder, BucketPath):
            return  # which is perhaps what the run waits for; they are in the log
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"stacks_{os.getpid()}.txt").open("w") as file:
            print(line, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)

    def _ask(self, line: str) -> None:
        _, step, waiting = self.status()
        print(self._diagnose_peers(line, step=step, waiting=waiting), file=sys.stderr, flush=True)
