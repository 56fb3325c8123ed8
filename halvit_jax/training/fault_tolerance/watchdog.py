"""A thread that ends a run which no longer moves, and says where each thread of it stands.

A pod that hangs costs as much as one that works. The loop says what it is about to do (`at`); when a phase lasts longer
than it may, the stacks of all threads are written and the process ends, so that whoever started it can start it again.
"""

import faulthandler
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable

from halvit_jax.protocols import STUCK

COMPILING, TRAINING = "compiling", "training"


class Watchdog:
    """Ends the process when `at` was not called for `timeout` seconds (`compile_timeout` in the phase COMPILING).

    `explain(line, step=, waiting=)` is asked about the other processes before the end; it has ten seconds.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        timeout: float,
        compile_timeout: float,
        name: str = "",
        explain: Callable[..., str] = lambda line, *, step, waiting: "",
    ) -> None:
        self._folder, self._timeout, self._compile_timeout = folder, timeout, compile_timeout
        self._name, self._explain = name, explain
        self._phase, self._step, self._since = "starting", 0, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._since = time.monotonic()
        self._thread.start()

    def at(self, phase: str, step: int) -> None:
        """The run has moved: it is now in this phase, after this step."""
        self._phase, self._step, self._since = phase, step, time.monotonic()

    def where(self) -> tuple[str, int, bool]:
        """Where the run stands in words, its step, and whether it does nothing but wait for other processes."""
        waiting = self._phase == TRAINING  # the step itself needs nothing but them
        return f"in phase {self._phase!r} after step {self._step}", self._step, waiting

    def stop(self) -> None:
        """Watch no longer."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = min(self._timeout, self._compile_timeout) / 20
        while not self._over.wait(min(pause, 1.0)):
            allowed = self._compile_timeout if self._phase == COMPILING else self._timeout
            waited = time.monotonic() - self._since
            if waited > allowed:
                self._end(f"no progress for {waited:.0f} s {self.where()[0]}")

    def _end(self, line: str) -> None:
        line = f"{self._name}{line}"
        print(f"error: {line}; the stacks of all threads follow", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"stacks_{os.getpid()}.txt").open("w") as file:
            print(line, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        asking = threading.Thread(target=self._ask, args=(line,), daemon=True)
        asking.start()
        asking.join(10.0)
        os._exit(STUCK)

    def _ask(self, line: str) -> None:
        _, step, waiting = self.where()
        print(self._explain(line, step=step, waiting=waiting), file=sys.stderr, flush=True)
