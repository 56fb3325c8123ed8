import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest

from halvit_jax.experiment import lock
from halvit_jax.experiment.workdir import LOCK_FILE

HOLDER = """
import pathlib, sys, time
from halvit_jax.experiment import lock
from halvit_jax.experiment.workdir import LOCK_FILE
with lock.acquire(pathlib.Path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_with_what_holds_the_lock_until_that_is_killed(tmp_path: pathlib.Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        since = r"since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"
        who = f"process {holder.pid} on {re.escape(socket.gethostname())} {since}"
        with pytest.raises(ValueError, match=f"--workdir={tmp_path} is in use by {who}"), lock.acquire(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    with lock.acquire(tmp_path):  # the lock of a dead process locks nothing
        assert f'"pid": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text()
    with lock.acquire(tmp_path):
        pass


def test_a_holder_that_has_not_signed_yet_is_another_run(tmp_path: pathlib.Path) -> None:
    with lock.acquire(tmp_path):
        (tmp_path / LOCK_FILE).write_text("")
        with pytest.raises(ValueError, match="in use by another run"), lock.acquire(tmp_path):
            pass
