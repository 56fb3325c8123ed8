"""The script that runs as a Slurm job and requeues itself."""

import pathlib

import pytest
from helpers.launch_scripts import FLAGS, RUN, calls, run_script


@pytest.mark.parametrize(
    ("code", "count", "again"), [("0", "0", False), ("75", "0", True), ("70", "4", True), ("75", "100", False)]
)
def test_slurm_requeues_by_exit_code(code: str, count: str, again: bool, tmp_path: pathlib.Path) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_RESTART_COUNT": count}
    node = {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16"}
    assert run_script(tmp_path, "slurm.sh", *FLAGS, codes=code, **job, **node)[0] == int(code)
    run = RUN.replace("main", "main --cluster")
    assert calls(tmp_path) == ["srun devices=0,1,2,3 cpus=16", run, *["scontrol requeue 7"] * again]


def test_slurm_outside_a_job_prints_its_usage(tmp_path: pathlib.Path) -> None:
    assert "usage, in the root" in run_script(tmp_path, "slurm.sh", *FLAGS, codes="0")[1]
