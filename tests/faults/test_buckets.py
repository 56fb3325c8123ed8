"""Runs whose workdir and data are in a bucket, which is a server of the storage API with faults.

The default tier verifies a finished run there; the trials of faults are in the slow tier.
"""

import json
import pathlib
import random
import re
import signal
import time
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from helpers.gcs_server import Server
from helpers.processes import Started, run_command
from helpers.runs import MAIN

from halvit_jax import storage
from halvit_jax.experiment import workdir as files
from halvit_jax.training.checkpoint import manifest
from halvit_jax.training.checkpoint.checkpointer import Checkpointer
from halvit_jax.training.checkpoint.manifest import CorruptCheckpointError

STEPS, SAVE_EVERY, KILLS = 200, 10, 10
STARTED = "first step done"
RUN = [
    "--config=configs/halvit_digits.py",
    "--config.model.width=24",
    "--config.model.depth=1",
    "--config.batch_size=64",
    "--config.recipe_batch_size=64",
    f"--config.total_steps={STEPS}",
    "--config.optim.warmup_epochs=0.0",
    "--config.loop.log_every=10",
    "--config.loop.eval_every=100",
    f"--config.loop.checkpoint_every={SAVE_EVERY}",
]


@pytest.fixture
def copied(server: Server, workdir: pathlib.Path) -> str:
    """A finished run, copied into the bucket from a disk."""
    for name in storage.files_below(workdir):
        server.bucket.put(f"run/{name}", (workdir / name).read_bytes())
    return f"{server.url}/run"


def _largest(server: Server, step: int) -> str:
    names = [name for name in server.bucket.names(f"run/checkpoints/{step}/") if not name.endswith(manifest.NAME)]
    return max(names, key=lambda name: len(server.bucket.objects[name].data))


def test_a_flipped_byte_in_an_object_is_found_and_named_by_check(copied: str, server: Server) -> None:
    server.bucket.flip(_largest(server, 8))
    server.bucket.put("run/checkpoints/12/default/half", b"written by a run that was killed")
    checked = ("halvit_jax.check", f"--workdir={copied}", "--files_only")
    lines = run_command(*checked, code=1, environment=server.environment).stdout.splitlines()
    assert lines[0] == "lock  free"
    assert lines[1] == "step 4  good"
    assert lines[2].startswith(f"step 8  corrupt: gs://bucket/{_largest(server, 8)} has the digest ")
    assert lines[3] == "leftover  checkpoints/12, 32 bytes: an unfinished save; the next run removes it"
    assert lines[4] == "2 checkpoints, 1 good; corrupt: step 8"


def test_a_folder_in_a_bucket_is_sealed_and_every_damage_is_named(server: Server) -> None:
    server.bucket.page = 2
    folder = storage.parse(f"{server.url}/run/checkpoints/4")
    for name in ("default/a", "default/b", "default/c", storage.COMMITTED):
        (folder / name).write_bytes(b"array")
    assert not manifest.is_sealed(folder)
    manifest.write(folder, 4)
    assert sorted(manifest.verify(folder)["files"]) == [storage.COMMITTED, "default/a", "default/b", "default/c"]
    server.bucket.flip("run/checkpoints/4/default/b")
    with pytest.raises(CorruptCheckpointError, match=r"gs://bucket/run/checkpoints/4/default/b has the digest"):
        manifest.verify(folder)
    (folder / "default/b").write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match=r"default/b has 0 bytes, expected 5"):
        manifest.verify(folder)
    (folder / "default/b").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"gs://bucket/run/checkpoints/4/default/b is missing"):
        manifest.verify(folder)
    manifest.unseal(folder)
    assert not manifest.is_sealed(folder)


def test_a_bucket_without_access_is_no_corrupt_checkpoint(server: Server) -> None:
    folder = storage.parse(f"{server.url}/run/checkpoints/4")
    (folder / "array").write_bytes(b"array")
    manifest.write(folder, 4)
    server.bucket.forbidden = ("GET",)
    for read in (manifest.read, manifest.verify):
        with pytest.raises(storage.StorageError, match=r"gs://bucket/run/checkpoints/4.* cannot be reached"):
            read(folder)


def test_metadata_that_cannot_be_read_are_no_corrupt_checkpoint(copied: str, server: Server) -> None:
    checkpointer = Checkpointer(storage.parse(copied), read_only=True)
    try:
        assert checkpointer.steps() == [4, 8]  # a copy is committed
        assert checkpointer.metadata(8)["step"] == 8
        server.bucket.forbidden = ("GET",)
        with pytest.raises(storage.StorageError, match=r"gs://bucket/run/checkpoints.* cannot be reached: .*403"):
            checkpointer.metadata(4)
    finally:
        server.bucket.forbidden = ()
        checkpointer.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Compiled programs, shared by all runs."""
    return f"--config.compilation_cache={tmp_path_factory.mktemp('compiled')}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits_dir: pathlib.Path, cache: str) -> dict[str, Any]:
    """The result of the run on a disk."""
    workdir = tmp_path_factory.mktemp("disk") / "run"
    run_command(MAIN, *RUN, cache, f"--workdir={workdir}", f"--config.data.data_dir={digits_dir}")
    return json.loads((workdir / files.RESULT_FILE).read_text())


class _Trial:
    """Starts of one run in the bucket, and what they have printed."""

    def __init__(self, server: Server, log: pathlib.Path, cache: str) -> None:
        self.server, self.log = server, log
        places = [f"--workdir={server.url}/run", f"--config.data.data_dir={server.url}/tfds"]
        self._arguments = [*RUN, cache, *places]

    def start(self, *more: str) -> Started:
        return Started(MAIN, *self._arguments, *more, stdout=self.log, environment=self.server.environment)

    def finish(self, *more: str, code: int = 0) -> str:
        """Run to the end, and return what it printed."""
        before = len(self.text())
        found = self.start(*more).wait(280.0)
        printed = self.text()[before:]
        assert found == code, printed
        return printed

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, text: str, process: Started) -> None:
        """Wait until a line is printed."""
        end = time.monotonic() + 200.0
        while text not in self.text():
            assert process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)

    def wait_for_start(self, process: Started) -> None:
        """Wait until the first step of a start is done."""
        before = self.text().count(STARTED)
        end = time.monotonic() + 200.0
        while process.poll() is None and self.text().count(STARTED) == before:
            assert time.monotonic() < end, self.text()
            time.sleep(0.01)

    def result(self) -> dict[str, Any]:
        return json.loads(self.server.bucket.text(f"run/{files.RESULT_FILE}"))


@pytest.fixture
def trial(server: Server, tmp_path: pathlib.Path, cache: str) -> _Trial:
    """The run in an empty bucket."""
    return _Trial(server, tmp_path / "log.txt", cache)


@pytest.mark.slow
def test_a_run_in_a_bucket_killed_at_ten_random_moments_ends_as_the_one_on_a_disk(
    trial: _Trial, whole: dict[str, Any]
) -> None:
    moments = random.Random(0)
    trial.server.bucket.page = 5
    for kill in range(KILLS):
        process = trial.start()
        # Two of three while it trains, saves or evaluates; else while it starts, at first while it prepares the data.
        started = kill % 3 > 0
        if started:
            trial.wait_for_start(process)
        process.join(moments.uniform(1.0, 6.0 if started else 8.0))
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
    trial.finish()
    assert trial.result()["params_sha256"] == whole["params_sha256"]
    assert trial.result()["eval"] == whole["eval"]
    assert "Traceback" not in trial.text()
    steps = {name.split("/")[2] for name in trial.server.bucket.names("run/checkpoints/") if name.count("/") > 2}
    assert len(steps) <= 3  # the newest two and the best
    assert run_command("halvit_jax.check", f"--workdir={trial.server.url}/run", environment=trial.server.environment)


@pytest.mark.slow
def test_sigterm_saves_into_the_bucket_releases_the_lock_and_the_run_resumes(
    trial: _Trial, whole: dict[str, Any]
) -> None:
    process = trial.start()
    trial.wait_for("step 20/", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert re.search(r"stopped by SIGTERM: saved at step \d+", trial.text())
    assert f"run/{files.LOCK_FILE}" not in trial.server.bucket.names()
    assert "resuming from the checkpoint of step" in trial.finish()
    assert trial.result()["params_sha256"] == whole["params_sha256"]


@pytest.mark.slow
def test_a_bucket_that_does_not_answer_for_seconds_or_answers_slowly_changes_nothing(
    trial: _Trial, whole: dict[str, Any]
) -> None:
    process = trial.start()
    trial.wait_for("step 10/", process)
    for step in (30, 60, 90):
        trial.wait_for(f"step {step}/", process)
        trial.server.bucket.unavailable = 8
    trial.server.bucket.delay = 0.1  # a save has some hundred requests
    trial.wait_for("step 120/", process)
    trial.server.bucket.delay = 0.0
    assert process.wait(280.0) == 0, trial.text()
    assert trial.result()["params_sha256"] == whole["params_sha256"]
    assert "Traceback" not in trial.text()


@pytest.mark.slow
def test_a_permission_that_is_lost_half_way_ends_the_run_with_one_line_and_it_resumes(
    trial: _Trial, whole: dict[str, Any]
) -> None:
    process = trial.start()
    trial.wait_for("step 60/", process)
    trial.server.bucket.forbidden = ("POST", "PUT", "DELETE")
    assert process.wait(280.0) == 3, trial.text()
    (line,) = [line for line in trial.text().splitlines() if line.startswith("error: ")]
    assert re.search(r"the checkpoint of step \d+ could not be written to gs://bucket/run/checkpoints", line)
    assert "403" in line or "PERMISSION_DENIED" in line
    trial.server.bucket.forbidden = ()
    assert "resuming from the checkpoint of step" in trial.finish()
    assert trial.result()["params_sha256"] == whole["params_sha256"]


@pytest.mark.slow
def test_a_second_run_on_the_same_workdir_is_refused_and_the_first_one_goes_on(
    trial: _Trial, whole: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    process = trial.start()
    trial.wait_for("step 10/", process)
    second = _Trial(trial.server, tmp_path / "second.txt", trial._arguments[len(RUN)])
    assert "--workdir=gs://bucket/run is in use by process " in second.finish(code=2)
    assert process.wait(280.0) == 0
    assert trial.result()["params_sha256"] == whole["params_sha256"]


@pytest.mark.slow
def test_images_and_weights_come_from_the_bucket_in_every_command(
    copied: str, server: Server, tmp_path: pathlib.Path, cache: str
) -> None:
    server.bucket.page = 7
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
    for number, image in enumerate(pixels):
        for split in ("train", "test"):
            content = tf.io.encode_png(image).numpy()
            server.bucket.put(f"images/{split}/class {number % 2}/{number}.png", content)
    image = f"{server.url}/images/test/class 0/0.png"
    predicted = ("halvit_jax.predict", f"--workdir={copied}", "--step=best", image)
    found = run_command(*predicted, environment=server.environment)
    assert len(json.loads(found.stdout)["top5"]) == 5
    out = tmp_path / "model.safetensors"
    exported = ("halvit_jax.export", f"--workdir={copied}", "--format=safetensors", f"--out={out}")
    run_command(*exported, environment=server.environment)
    server.bucket.put("weights/model.safetensors", out.read_bytes())
    data = ["--config.data.name=folder", f"--config.data.root={server.url}/images", "--config.data.eval_split=test"]
    model = ["--config.model.width=32", "--config.model.depth=2", "--config.model.num_heads=2"]
    length = ["--config.batch_size=10", "--config.recipe_batch_size=10", "--config.total_steps=2"]
    arguments = [*RUN, *model, *length, *data, "--config.model.num_classes=0", cache]
    for number, source in enumerate((f"{copied}@8", f"{server.url}/weights/model.safetensors")):
        given = [*arguments, f"--config.init_from={source}", f"--workdir={server.url}/tuned{number}"]
        assert f"init_from={source}: " in run_command(MAIN, *given, environment=server.environment).stdout
    first, second = (json.loads(server.bucket.text(f"tuned{number}/result.json")) for number in range(2))
    assert first["params_sha256"] == second["params_sha256"]
    given = [f"--workdir={server.url}/tuned0", "--mode=eval", "--step=best", *arguments]
    for _ in range(2):
        run_command(MAIN, *given, environment=server.environment)
    lines = server.bucket.text(f"tuned0/{files.EVALS_FILE}").splitlines()
    assert [json.loads(line)["eval"] for line in lines] == [first["eval"]] * 2
    checked = run_command("halvit_jax.check", f"--workdir={server.url}/new", *arguments, environment=server.environment)
    assert "gs://bucket/new does not exist; the run will create it" in checked.stdout
    assert server.bucket.names("new") == []


def test_an_export_into_a_bucket_is_refused() -> None:
    error = run_command(
        "halvit_jax.export", "--workdir=runs/a", "--format=safetensors", "--out=gs://bucket/a.safetensors", code=2
    ).stderr
    assert error.startswith("error: --out=gs://bucket/a.safetensors must be a local path")


def test_data_in_another_store_are_refused() -> None:
    from halvit_jax.data import open_source

    with pytest.raises(ValueError, match=r"data.data_dir=s3://bucket/tfds must be a local path or .*gs://BUCKET"):
        open_source("digits", "s3://bucket/tfds", "train")
    with pytest.raises(ValueError, match=r"data.root=s3://bucket/images must be a local path or .*gs://BUCKET"):
        open_source("folder", "", "train", root="s3://bucket/images")


def test_data_without_access_are_one_line(server: Server) -> None:
    from halvit_jax.data import open_source

    server.bucket.forbidden = ("GET",)
    for name, field in (("folder", "data.root"), ("digits", "data.data_dir")):
        place = f"{server.url}/{name}"
        places = {"root": place} if name == "folder" else {}
        with pytest.raises(ValueError, match=rf"{field}={place} cannot be read \(.*403"):
            open_source(name, "" if places else place, "train", **places)
