"""Signals while a run starts: imports, data, restoring. This module is imported first and imports nothing slow."""

import os
import signal
import types

PREEMPTED = 75  # ExitCode.PREEMPTED, whose module imports NumPy


def exit_on_signals() -> None:
    """Let SIGTERM and SIGINT end the process at once with exit code 75; nothing needs to be saved yet."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)


def ignore_signals() -> None:
    """Ignore SIGTERM and SIGINT: all is written, and the exit code stands."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _exit(number: int, frame: types.FrameType | None) -> None:
    del frame
    name = signal.Signals(number).name
    os.write(1, f"stopped by {name}: nothing had to be saved; the same command starts again\n".encode())
    os._exit(PREEMPTED)
