"""The script that starts and restarts a run on the machines of a TPU VM."""

import pathlib

from helpers.launch_scripts import TPU, calls, exit_code_after_sigterm, run_script, start_script


def test_tpu_vm_copies_installs_and_restarts(tmp_path: pathlib.Path) -> None:
    assert run_script(tmp_path / "a", "tpu_vm.sh", *TPU, codes="75 70")[0] == 70
    sent = " ".join(calls(tmp_path / "a")).split("gcloud ")[1:]  # one of them has several lines
    assert [call.split()[3] for call in sent] == ["scp", "ssh", "ssh", "ssh"]
    assert all("v5" in call and "--zone=us-a" in call and "--worker=all" in call for call in sent)
    assert "mkdir -p halvit_jax" in sent[1]
    assert sent[2].rstrip().endswith("python -m halvit_jax.main --cluster --config=a.py --workdir=a\\ folder")
    assert "usage: " in run_script(tmp_path / "b", "tpu_vm.sh", "v5", "us-a", codes="0")[1]


def test_tpu_vm_sigterm_stops_the_run_without_a_restart(tmp_path: pathlib.Path) -> None:
    assert exit_code_after_sigterm(start_script(tmp_path, "tpu_vm.sh", *TPU, codes="wait 0"), tmp_path) == 75
    assert sum("--cluster" in line for line in calls(tmp_path)) == 1
