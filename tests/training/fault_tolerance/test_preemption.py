import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from halvit_jax.training.fault_tolerance.preemption import SAVE_AGAIN, STOP, STOPPED, WISH, Signals, wish_of


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_wish_in_every_row_and_the_handlers_come_back(number: signal.Signals) -> None:
    batch, signals, before = {"mask": np.ones(4, bool)}, Signals(), signal.getsignal(number)
    with signals.listen():
        assert int(wish_of(signals.stamp(batch))) == 0
        assert int(wish_of(signals.stamp(batch, save_again=True))) == SAVE_AGAIN
        os.kill(os.getpid(), number)
        assert signals.name == number.name
        stamped = signals.stamp(batch, save_again=True)
    assert stamped[WISH].tolist() == [STOP] * 4
    assert signal.getsignal(number) is before


def test_a_batch_that_was_never_stamped_wishes_nothing() -> None:
    assert int(wish_of({"mask": np.ones(4, bool)})) == 0


def test_a_second_signal_ends_the_process_at_once() -> None:
    program = (
        "import os, signal, time; from halvit_jax.training.fault_tolerance.preemption import Signals\\n"
        "with Signals().listen():\\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('first', flush=True)\\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    ).replace("\\n", "\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (STOPPED, "first\n"), done.stderr
