import subprocess
import sys

import pytest

from halvit_jax.cli import malloc

FAULTS = """
import resource, numpy as np
from halvit_jax.cli.malloc import keep_freed_memory
if {keep}: assert keep_freed_memory()
np.ones(40 * 2**20, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): np.ones(40 * 2**20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(*, keep: bool) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(malloc.platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set")
def test_freed_blocks_are_used_again_without_new_pages() -> None:
    assert _faults(keep=True) < _faults(keep=False) / 4


def test_nothing_is_set_beside_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc.glob, "glob", lambda pattern: [pattern] if "nvidia" in pattern else [])
    assert malloc.keep_freed_memory() is False


def test_nothing_is_set_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert malloc.keep_freed_memory() is False
