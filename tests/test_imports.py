"""Who may import whom: the table of the design, held over every file of the package, imports inside functions too."""

import ast
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "halvit_jax"
ANYTHING = None

# A room -> what it may import beside the standard library and itself. A name stands for all that lies below it.
NUMERIC = {"jax", "flax.linen", "numpy"}
ROOMS: dict[str, set[str] | None] = {
    "protocols": {"numpy"},
    "config": {"ml_collections"},
    "recipes": {"ml_collections", "halvit_jax.config"},
    "layers": NUMERIC,
    "models": NUMERIC | {"halvit_jax.layers"},
    "detection": NUMERIC | {"halvit_jax.layers"},
    "tasks": NUMERIC | {"scipy", "halvit_jax.models", "halvit_jax.detection", "halvit_jax.protocols"},
    "data": {"tensorflow", "tensorflow_datasets", "numpy", "sklearn", "halvit_jax.protocols"},
    "training": {"jax", "numpy", "flax.struct", "optax", "orbax", "clu", "halvit_jax.protocols"},
    # jax for shapes and bfloat16; torch, an optional extra, for files that nothing else can read.
    "convert": {"numpy", "jax", "torch", "halvit_jax.models"},
    **dict.fromkeys(
        ("__init__", "run", "door", "cluster", "lock", "memory", "macs", "compiled", "initial", "intermediates")
    ),
    **dict.fromkeys(("main", "predict", "export", "bench", "families", "summary", "check", "preflight")),
    **dict.fromkeys(("plan", "tpu", "teacher")),
}
ONLY_IN_DATA = {"tensorflow", "tensorflow_datasets"}


def _rooms_on_disk() -> dict[str, list[pathlib.Path]]:
    rooms: dict[str, list[pathlib.Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = "main" if path.name == "__main__.py" else path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        rooms.setdefault(room, []).append(path)  # a folder's `__main__` is a door
    return rooms


def _imports(source: str) -> list[str]:
    """Full names of all that a file imports; relative and computed imports under names that no room may import."""
    names = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names += [alias.name for alias in node.names]
            case ast.ImportFrom():
                names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
            case ast.Name(id="__import__") | ast.Attribute(attr="import_module"):
                names.append("(computed import)")
    return names


def _forbidden(room: str, source: str) -> list[str]:
    return [name for name in _imports(source) if not _may_import(room, name)]


def _may_import(room: str, name: str) -> bool:
    if name.startswith((".", "(")):
        return False
    if name.split(".", maxsplit=1)[0] in sys.stdlib_module_names:
        return True
    allowed = ROOMS[room]
    if allowed is ANYTHING:
        return name.split(".", maxsplit=1)[0] not in ONLY_IN_DATA
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed | {f"halvit_jax.{room}"})


def test_every_file_and_folder_has_a_row_in_the_table() -> None:
    assert not set(_rooms_on_disk()) - set(ROOMS)


@pytest.mark.parametrize("room", _rooms_on_disk())
def test_a_room_imports_only_what_the_table_allows(room: str) -> None:
    found = {str(path.relative_to(PACKAGE)): _forbidden(room, path.read_text()) for path in _rooms_on_disk()[room]}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("protocols", "import jax"),
        ("config", "from halvit_jax import recipes"),
        ("layers", "from halvit_jax.models import vit"),
        ("layers", "from ..models import vit"),
        ("models", "def f():\n    from halvit_jax.tasks import mix"),
        ("models", "import importlib\nimportlib.import_module('halvit_jax.data')"),
        ("tasks", "from halvit_jax.training.optim import make_optimizer"),
        ("data", "import jax.numpy as jnp"),
        ("data", "from jax import numpy"),
        ("data", "from halvit_jax import models"),
        ("training", "from flax import linen"),
        ("training", "import flax"),
        ("training", "import halvit_jax"),
        ("training", "def f():\n    import halvit_jax.models.vit"),
        ("convert", "from halvit_jax.training import state"),
        ("main", "import tensorflow as tf"),
        ("main", "__import__('tensorflow')"),
    ],
)
def test_the_check_sees_a_wrong_import(room: str, source: str) -> None:
    assert _forbidden(room, source)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        (
            "layers",
            "from halvit_jax.layers.tied import TiedDense\nfrom flax import linen as nn\nimport jax.numpy as jnp",
        ),
        ("training", "from flax import struct\nfrom halvit_jax.training import paths\nimport json"),
        ("data", "import tensorflow as tf\nfrom halvit_jax.protocols import Loader"),
        ("main", "from halvit_jax import data, models\nimport jax"),
    ],
)
def test_the_check_lets_a_right_import_pass(room: str, source: str) -> None:
    assert not _forbidden(room, source)
