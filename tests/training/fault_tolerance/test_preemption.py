import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from halvit_jax.protocols import ExitCode
from halvit_jax.training.fault_tolerance.preemption import (
    REQUEST,
    SAVE_AGAIN,
    STOP,
    PreemptionHandler,
    requested,
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_request_in_every_row_and_the_handlers_come_back(number: signal.Signals) -> None:
    batch, preemption, before = {"mask": np.ones(4, bool)}, PreemptionHandler(), signal.getsignal(number)
    with preemption.install():
        assert int(requested(preemption.attach_request(batch))) == 0
        assert int(requested(preemption.attach_request(batch, save_again=True))) == SAVE_AGAIN
        os.kill(os.getpid(), number)
        assert preemption.name == number.name
        stamped = preemption.attach_request(batch, save_again=True)
    assert stamped[REQUEST].tolist() == [STOP] * 4
    assert signal.getsignal(number) is before


def test_a_batch_without_a_request_asks_for_nothing() -> None:
    assert int(requested({"mask": np.ones(4, bool)})) == 0


def test_a_second_signal_ends_the_process_at_once() -> None:
    program = (
        "import os, signal, time; from halvit_jax.training.fault_tolerance.preemption import PreemptionHandler\\n"
        "with PreemptionHandler().install():\\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('first', flush=True)\\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    ).replace("\\n", "\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (ExitCode.PREEMPTED, "first\n"), done.stderr
