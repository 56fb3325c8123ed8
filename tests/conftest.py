"""What all tests share. The environment is set here because it counts only until jax and TensorFlow are imported."""

import contextlib
import fcntl
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from helpers.gcs_server import Server

# What one test has compiled the next one loads, in processes of its own too.
CACHE = tempfile.TemporaryDirectory()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE.name)  # a second worker has the first one's
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PLATFORMS"] = "cpu"
# Eight simulated devices; code that is compiled in two thirds of the time, for it runs only a few times.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
for threads in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(threads, "2")

GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The switch that writes generated golden files."""
    parser.addoption("--update-golden", action="store_true", help="write golden configs and parameters; read the diff")


def pytest_configure() -> None:
    """Implicit promotion is an error. jax is imported here, after the environment above."""
    from helpers.promotion import forbid_promotion

    forbid_promotion()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files beside this one first: a few long tests each, which should not be what one of two workers ends with."""
    items.sort(key=lambda item: item.path.parent != pathlib.Path(__file__).parent)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder that the workers of pytest-xdist have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextlib.contextmanager
def _one_at_a_time(lock: pathlib.Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def digits_dir(shared: pathlib.Path) -> pathlib.Path:
    """A `data_dir` for TFDS in which the embedded digits are prepared.

    All workers have the same one: it is recorded in the config of the run that they share.
    """
    from halvit_jax.data import open_source

    folder = shared / "tfds"
    with _one_at_a_time(shared / "tfds.lock"):
        open_source("digits", str(folder), "train")
    return folder


@pytest.fixture(scope="session")
def finished(
    digits_dir: pathlib.Path, shared: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, dict[str, Any]]:
    """A workdir after a small run on digits, with checkpoints of the steps 4 and 8 of 8, and the run's result.

    The worker that asks first makes it, each has a copy.
    """
    from helpers.runs import tiny

    from halvit_jax.main import run_experiment

    made, returned = shared / "finished", shared / "finished.json"
    with _one_at_a_time(shared / "finished.lock"):
        if not returned.exists():
            returned.write_text(json.dumps(run_experiment(tiny(digits_dir, **{"loop.eval_every": 8}), made)))
    workdir = shutil.copytree(made, tmp_path_factory.mktemp("copy") / "finished")
    return workdir, json.loads(returned.read_text())


@pytest.fixture(scope="session")
def done(finished: tuple[pathlib.Path, dict[str, Any]]) -> pathlib.Path:
    """A workdir with checkpoints of the steps 4 and 8; only the second has a score."""
    return finished[0]


@pytest.fixture
def workdir(done: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of it to be damaged."""
    return shutil.copytree(done, tmp_path / "run")


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Server]":
    pytest.importorskip("google.cloud.storage", reason="a bucket needs the extra gcs")
    if not shutil.which("openssl"):
        pytest.skip("TensorFlow speaks to a bucket by TLS alone, and openssl makes the server's certificate")
    from helpers.gcs_server import serving

    with serving(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture
def server(_server: "Server", monkeypatch: pytest.MonkeyPatch) -> "Iterator[Server]":
    """A server of the storage API with an empty bucket, which this process and its children use."""
    from halvit_jax import buckets

    _server.bucket.__init__()  # everything as at first
    for name, value in _server.environment.items():
        monkeypatch.setenv(name, value)
    buckets.client.cache_clear()
    yield _server
    if buckets.client.cache_info().currsize:
        buckets.client()._http.close()  # else its connection is closed in another test, with a warning
    buckets.client.cache_clear()


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """The folder of reference outputs."""
    return GOLDEN


@pytest.fixture
def recorded(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """The content of a generated file of tests/golden; with --update-golden, `found` is written to it first."""

    def read(name: str, found: dict[str, Any] | None = None) -> dict[str, Any]:
        if found is not None and request.config.getoption("--update-golden"):
            (GOLDEN / name).write_text(_text(found) + "\n")
        return json.loads((GOLDEN / name).read_text())

    return read


def _text(tree: dict[str, Any], indent: str = " ") -> str:
    """JSON in which each entry of the file begins a line, and an object among them fills its lines."""
    items = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in tree.items()]
    if indent == " ":
        items = [
            f"{json.dumps(key)}: {_text(value, '  ')}" if isinstance(value, dict) else item
            for (key, value), item in zip(tree.items(), items, strict=True)
        ]
        return "{\n " + ",\n ".join(items) + "\n}"
    lines = [""]
    for item in items:
        if lines[-1] and len(lines[-1]) + len(item) > 112:
            lines.append("")
        lines[-1] += f", {item}" if lines[-1] else item
    return "{" + f",\n{indent}".join(lines) + "}"


@pytest.fixture(scope="session")
def reference_weights() -> types.ModuleType:
    """The file that derives the weights and images of every reference output from names and shapes."""
    spec = importlib.util.spec_from_file_location("reference_weights", GOLDEN / "reference_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
