import pathlib

import jax
import jax.numpy as jnp
import pytest
from helpers.gcs_server import Server

from halvit_jax import storage
from halvit_jax.training.profiling import Profiler, ProfileRange, parse_range


def test_a_profile_range_is_two_steps() -> None:
    assert parse_range("10:12") == ProfileRange(10, 12)


@pytest.mark.parametrize("text", ["10", "12:10", "a:b", "-1:3", "1:2:3"])
def test_a_wrong_profile_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--profile={text} must be FIRST:LAST"):
        parse_range(text)


def _run(profiler: Profiler, steps: int) -> None:
    step_function = jax.jit(lambda x: x + 1)
    x = jnp.zeros(())
    for step in range(steps):
        profiler.before(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            x = step_function(x)
        profiler.after(step, x)
    profiler.close()


@pytest.mark.parametrize("steps", [6, 3])  # to the end of the range, or stopped inside it
def test_a_profile_is_where_tensorboard_looks_for_it(steps: int, tmp_path: pathlib.Path) -> None:
    _run(Profiler(tmp_path, ProfileRange(2, 3)), steps)
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 0


def test_a_profile_of_a_run_in_a_bucket_is_copied_there(server: Server) -> None:
    _run(Profiler(storage.parse(f"{server.url}/run/profile"), ProfileRange(0, 0)), 1)
    (trace,) = [name for name in server.bucket.names("run/profile/plugins/profile/") if name.endswith(".xplane.pb")]
    assert server.bucket.objects[trace].data


def test_without_a_range_no_profile_is_written(tmp_path: pathlib.Path) -> None:
    _run(Profiler(tmp_path), 3)
    assert list(tmp_path.iterdir()) == []
