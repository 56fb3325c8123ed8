import ast
import inspect
import json
import pathlib
import textwrap
import typing
from collections.abc import Callable
from typing import Any

import pytest
from ml_collections import ConfigDict

from halvit_jax import data, distributed
from halvit_jax.config import default_config, from_json, smoke, to_json, validate
from halvit_jax.detection.create import DETECTORS
from halvit_jax.experiment import teacher
from halvit_jax.models import FAMILIES
from halvit_jax.recipes import imagenet
from halvit_jax.tasks.classification import Classification
from halvit_jax.tasks.detection import Detection
from halvit_jax.tasks.distillation import Distillation
from halvit_jax.training import loop
from halvit_jax.training.checkpoint.checkpointer import Checkpointer
from halvit_jax.training.fault_tolerance.grad_spikes import make_guard
from halvit_jax.training.fault_tolerance.watchdog import Watchdog
from halvit_jax.training.optim import make_optimizer
from halvit_jax.training.sharding import make_mesh

PACKAGE = pathlib.Path(__file__).parents[1] / "halvit_jax"


def test_json_brings_back_the_same_config() -> None:
    config = imagenet.deit("halvit_tiny")
    config.model.width = 96
    assert to_json(from_json(to_json(config))) == to_json(config)


@pytest.mark.parametrize("fields", [{"modell": {}}, {"batch_size": "many"}, {"model": 3}])
def test_a_text_that_is_no_config_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a config of this library"):
        from_json(json.dumps({"format": 1} | fields))
    with pytest.raises(ValueError, match="not a config of this library"):
        from_json("[]")


def test_a_config_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"config\.json has format=None, .* format=1"):
        from_json("{}")
    with pytest.raises(ValueError, match=r"config\.json has format=2, .* format=1"):
        from_json(to_json(default_config()).replace('"format": 1', '"format": 2'))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "batch_size=0 must be at least 1"),
        ("save.keep", 0, "save.keep=0 must be at least 1"),
        ("watchdog.timeout", 0.0, "watchdog.timeout=0.0 must be a positive number of seconds"),
        ("cluster.start_timeout", -1, "cluster.start_timeout=-1 must be a positive number of seconds"),
        ("seed", -1, "seed=-1 must not be negative"),
        ("total_steps", 5, "total_steps=5 and num_epochs=300: set one of them"),
        ("classification.mix_group", 48, r"classification.mix_group=48 does not divide batch_size = 1024"),
        ("classification.norm_group", 48, r"classification.norm_group=48 does not divide batch_size = 1024"),
        ("loop.ema_decay", 1.0, r"loop.ema_decay=1.0 must lie in \[0, 1\)"),
        ("matmul_precision", "low", "matmul_precision='low' is not one of default, high, highest"),
        ("compute_dtype", "half", "compute_dtype='half' is not one of auto, float32, bfloat16"),
    ],
)
def test_impossible_values_are_refused(field: str, value: object, message: str) -> None:
    config = imagenet.deit("halvit_tiny")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        validate(config)


# Sub-tree -> the constructor whose keywords it lists.
CONSTRUCTORS: dict[str, Any] = {
    "data": data.make_loaders,
    "instances": data.make_detection_loaders,
    "classification": Classification.__init__,
    "distillation": Distillation.__init__,
    "loop": loop.train,
    "save": Checkpointer.__init__,
    "optim": make_optimizer,
    "mesh": make_mesh,
    "cluster": distributed.process_group,
    "watchdog": Watchdog.__init__,
    "skip_updates": make_guard,
}


def test_every_field_is_read_somewhere() -> None:
    """A field that nothing reads would be a knob that does nothing."""
    config = default_config()
    by_name = {name for path in sources() for name in config_reads(path.read_text())}
    for name, value in config.items():
        if name in CONSTRUCTORS:
            assert set(value) <= used_keywords(CONSTRUCTORS[name]), name
        elif name == "detection":
            fields = {field for detector in DETECTORS.values() for field in detector.__dataclass_fields__}
            assert set(value) <= used_keywords(Detection.__init__) | fields
        elif name == "model":
            assert set(value) - {"name"} <= {field for path in sources() for field in self_reads(path.read_text())}
        elif name == "teacher":
            functions = (function for function in vars(teacher).values() if inspect.isfunction(function))
            assert any(set(value) <= used_keywords(function) for function in functions)
        else:
            assert ({f"{name}.{field}" for field in value} if isinstance(value, ConfigDict) else {name}) <= by_name


@pytest.mark.parametrize(
    ("source", "reads"),
    [("x = config.seed", {"seed"}), ("config.seed = 1", set()), ("x = run.seed", set())],
)
def test_a_field_is_read_where_it_is_loaded_from_the_config(source: str, reads: set[str]) -> None:
    assert set(config_reads(source)) == reads


def test_a_keyword_that_is_not_used_is_no_field_that_is_read() -> None:
    def constructor(used: int, unused: int) -> int:
        return used

    assert used_keywords(constructor) == {"used"}


def sources() -> list[pathlib.Path]:
    """All files of the package but those that define and set the fields."""
    return [path for path in PACKAGE.rglob("*.py") if path.name != "config.py" and path.parent.name != "recipes"]


def config_reads(source: str) -> list[str]:
    """Fields that code loads from a config by name: "seed" of `config.seed`, "task.mean" of `config.task.mean`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            _, _, field = ast.unparse(node).rpartition("config.")
            found += [field] if ast.unparse(node).startswith(("config.", "self.config.")) else []
    return found


def self_reads(source: str) -> set[str]:
    """Attributes of themselves that the methods in a file read."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if ast.unparse(node.value) == "self" and isinstance(node.ctx, ast.Load)}


def used_keywords(function: Callable[..., Any]) -> set[str]:
    """The parameters of a function that its body uses."""
    body = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    names = {node.id for node in ast.walk(body) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return names & set(inspect.signature(function).parameters)


def test_the_model_has_the_fields_of_all_families_with_their_types() -> None:
    """A field that two families have is of one type in both."""
    kinds: dict[str, Any] = {}
    for family in FAMILIES:
        for field, kind in family.field_types.items():
            assert kinds.setdefault(field, kind) == kind, f"model.{field} of {family.model.__name__}"
    config = default_config().model
    assert set(config) - {"name"} == set(kinds) - {"dtype", "folded"}
    for field in set(config) - {"name"}:
        assert issubclass(config.get_type(field), typing.get_origin(kinds[field]) or kinds[field]), field


def test_smoke_shortens_any_config_and_leaves_the_given_one_alone() -> None:
    config = imagenet.deit("halvit_tiny")
    before = to_json(config)
    short = smoke(config)
    validate(short)
    assert to_json(config) == before
    assert (short.total_steps, short.num_epochs, short.optim.warmup_epochs) == (20, 0, 0.0)
    assert (short.loop.log_every, short.loop.eval_every, short.loop.checkpoint_every) == (5, 10, 10)
    assert short.data.eval_split == "validation[:1%]"
    assert short.model.width == config.model.width


def test_early_stopping_must_not_be_negative() -> None:
    config = default_config()
    config.total_steps = 1
    config.loop.early_stopping = -1
    with pytest.raises(ValueError, match=r"loop\.early_stopping=-1 must not be negative"):
        validate(config)
