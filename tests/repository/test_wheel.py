"""The wheel holds what the repository holds, and works from any folder."""

import os
import pathlib
import subprocess
import sys
import tomllib

import pytest
from helpers.pages import ROOT


def test_every_package_travels_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent for path in (ROOT / "halvit_jax").rglob("__init__.py")]
    found = [".".join(folder.relative_to(ROOT).parts) for folder in folders]
    assert sorted(listed) == sorted([*found, "halvit_jax.configs"])


@pytest.mark.slow
def test_an_installed_wheel_trains_from_a_folder_with_spaces_and_umlauts(tmp_path: pathlib.Path) -> None:
    place = tmp_path / "an där ⌘ folder"
    place.mkdir()
    build = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*build, "wheel", "--no-deps", "--wheel-dir", str(place), str(ROOT)], check=True)
    (wheel,) = place.glob("*.whl")
    site = place / "site packages"
    subprocess.run([*build, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    for part in ("py.typed", "configs/halvit_tiny.py"):
        assert (site / "halvit_jax" / part).is_file()
    work = place / "running here"
    work.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site), "XLA_FLAGS": "", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(site / "bin" / "halvit")]
    fields = [
        "--config.total_steps=4",
        "--config.optim.warmup_epochs=0.0",
        f"--config.data.data_dir={work / 'data dir'}",
    ]
    train = [*command, "train", "--config=halvit_digits", "--workdir=läufe/the run", *fields]
    ran = subprocess.run(train, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (work / "läufe/the run/result.json").is_file()
    ran = subprocess.run([*command, "--version"], cwd=work, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("halvit_jax ")
