"""The script that starts and restarts a run on the GPUs of one machine."""

import pathlib

import pytest
from helpers.launch_scripts import FLAGS, RUN, calls, exit_code_after_sigterm, run_script, start_script


@pytest.mark.parametrize(
    ("codes", "ends", "runs"), [("0", 0, 1), ("75 70 0", 0, 3), ("75 2", 2, 2), ("3", 3, 1), ("70 70 70 70", 70, 3)]
)
def test_gpu_restarts_by_exit_code(codes: str, ends: int, runs: int, tmp_path: pathlib.Path) -> None:
    assert run_script(tmp_path, "gpu.sh", *FLAGS, codes=codes, RESTARTS="2")[0] == ends
    assert calls(tmp_path) == [RUN] * runs


def test_gpu_sigterm_stops_the_run_without_a_restart(tmp_path: pathlib.Path) -> None:
    assert exit_code_after_sigterm(start_script(tmp_path, "gpu.sh", *FLAGS, codes="wait 0"), tmp_path) == 75
    assert calls(tmp_path) == [RUN]


def test_gpu_leaves_memory_to_other_processes(tmp_path: pathlib.Path) -> None:
    assert run_script(tmp_path / "a", "gpu.sh", *FLAGS, codes="0", GPU_PIDS="123")[0] == 0
    assert calls(tmp_path / "a") == [f"{RUN}false"]
    code, logged = run_script(tmp_path / "b", "gpu.sh", codes="0")
    assert code == 2
    assert "usage: " in logged
