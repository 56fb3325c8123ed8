"""Who may import whom: the table of the design, held over every file of the package, imports inside functions too."""

import ast
import graphlib
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[2] / "halvit_jax"
ANYTHING = None

# A package -> what it may import beside the standard library and itself. A name stands for all that lies below it.
NUMERIC = {"jax", "flax.linen", "numpy", "halvit_jax.trees"}
OURS = "halvit_jax"
STORES = {"halvit_jax.storage", "halvit_jax.buckets"}
PACKAGES: dict[str, set[str] | None] = {
    "protocols": {"numpy"},
    "text": set(),
    "config": {"ml_collections"},
    "buckets": {"google", "halvit_jax.text"},
    "storage": {"google", "halvit_jax.buckets"},
    "trees": {"jax", "numpy", "halvit_jax.protocols"},
    "distributed": {"jax", "absl", "halvit_jax.protocols", "halvit_jax.text", *STORES},
    "recipes": {"ml_collections", "halvit_jax.config"},
    "layers": NUMERIC,
    "models": NUMERIC | {"halvit_jax.layers"},
    "detection": NUMERIC
    | {f"{OURS}.{name}" for name in ("layers", "protocols", "storage", "text")}
    | {"pycocotools", "faster_coco_eval"},
    "tasks": NUMERIC
    | {"scipy", "halvit_jax.models", "halvit_jax.detection", "halvit_jax.protocols", "halvit_jax.text"},
    "data": {"tensorflow", "tensorflow_datasets", "numpy", "sklearn", "PIL", "pycocotools"}
    | {f"{OURS}.{name}" for name in ("protocols", "text")}
    | STORES,
    "training": {"jax", "numpy", "flax.struct", "optax", "orbax", "clu"}
    | {f"{OURS}.{name}" for name in ("protocols", "trees", "text")}
    | STORES,
    # jax for shapes and bfloat16; torch, an optional extra, for files that nothing else can read.
    "convert": {
        "numpy",
        "jax",
        "torch",
        "huggingface_hub",
        "halvit_jax.models",
        "halvit_jax.layers",
        "halvit_jax.trees",
        "halvit_jax.text",
        "halvit_jax.storage",
    },
    "halving": NUMERIC | {"scipy", "optax", "halvit_jax.layers", "halvit_jax.models"},
    "experiment": {"jax", "numpy", "flax.linen", "ml_collections", "tensorboard"}
    | {f"{OURS}.{name}" for name in ("config", "protocols", "trees", "text", "models", "tasks", "data", "training")}
    | {f"{OURS}.{name}" for name in ("convert", "distributed", "halving")}
    | STORES,
    # torch and torchvision, which the user installs, to be measured beside us.
    "analysis": {"jax", "flax.linen", "numpy", "ml_collections", "matplotlib", "torch", "torchvision"}
    | {f"{OURS}.{name}" for name in ("models", "experiment", "config", "recipes", "layers", "training", "convert")}
    | {f"{OURS}.detection"}
    | {f"{OURS}.{name}" for name in ("trees", "text", "protocols")},
    "cli": ANYTHING,
    **dict.fromkeys(("__init__", "main", "predict", "export", "halve", "bench", "summary", "check", "plan"), ANYTHING),
}
ONLY_IN_DATA = {"tensorflow", "tensorflow_datasets"}


def _packages_on_disk() -> dict[str, list[pathlib.Path]]:
    packages: dict[str, list[pathlib.Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        package = "main" if path.name == "__main__.py" else path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        packages.setdefault(package, []).append(path)  # a folder's `__main__` is a command
    return packages


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def _ours(path: pathlib.Path) -> set[str]:
    """The modules of ours that a file imports, inside functions too."""
    names = {name if name in MODULES else name.rpartition(".")[0] for name in _imports(path.read_text())}
    return names & set(MODULES)


def _imports(source: str) -> list[str]:
    """Full names of all that a file imports; relative and computed imports under names that no package may import."""
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


def _forbidden(package: str, source: str) -> list[str]:
    return [name for name in _imports(source) if not _may_import(package, name)]


def _may_import(package: str, name: str) -> bool:
    if name.startswith((".", "(")):
        return False
    if name.split(".", maxsplit=1)[0] in sys.stdlib_module_names:
        return True
    allowed = PACKAGES[package]
    if allowed is ANYTHING:
        return name.split(".", maxsplit=1)[0] not in ONLY_IN_DATA
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed | {f"halvit_jax.{package}"})


def test_every_file_and_folder_has_a_row_in_the_table() -> None:
    assert not set(_packages_on_disk()) - set(PACKAGES)


@pytest.mark.parametrize("package", _packages_on_disk())
def test_a_package_imports_only_what_the_table_allows(package: str) -> None:
    found = {
        str(path.relative_to(PACKAGE)): _forbidden(package, path.read_text()) for path in _packages_on_disk()[package]
    }
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("package", "source"),
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
def test_the_check_sees_a_wrong_import(package: str, source: str) -> None:
    assert _forbidden(package, source)


@pytest.mark.parametrize(
    ("package", "source"),
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
def test_the_check_lets_a_right_import_pass(package: str, source: str) -> None:
    assert not _forbidden(package, source)


def test_no_module_imports_itself_through_others() -> None:
    graphlib.TopologicalSorter({name: _ours(path) - {name} for name, path in MODULES.items()}).prepare()
