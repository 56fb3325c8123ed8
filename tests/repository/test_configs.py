import ast
import importlib.util
import inspect
import itertools
import json
import pathlib
import re
import textwrap
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from halvit_jax import data, distributed
from halvit_jax.cli import app
from halvit_jax.config import default_config, from_json, to_json, validate
from halvit_jax.experiment.tasks import build_task
from halvit_jax.experiment.teacher import abstract_task
from halvit_jax.models import MODELS, create_model, fields_of, partition_rules
from halvit_jax.models.validation import merge_field_types
from halvit_jax.recipes import digits, imagenet
from halvit_jax.recipes.variants import choose
from halvit_jax.tasks.classification import Classification
from halvit_jax.tasks.distillation import Distillation
from halvit_jax.training import loop
from halvit_jax.training.checkpoint.checkpointer import Checkpointer
from halvit_jax.training.fault_tolerance.grad_spikes import make_limit
from halvit_jax.training.fault_tolerance.watchdog import Watchdog
from halvit_jax.training.optim import make_optimizer, path_mask
from halvit_jax.training.sharding import make_mesh
from halvit_jax.trees import first_match, flatten, variable_shapes

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}
Recorded = Callable[[str, dict[str, Any]], dict[str, Any]]


def module(name: str) -> types.ModuleType:
    """A file of configs/, imported as the flag imports it."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS[name])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(entry: str) -> ConfigDict:
    """The config of "file" or "file:variant"."""
    name, _, variant = entry.partition(":")
    return module(name).get_config(*[variant] if variant else [])


def entries(name: str) -> list[str]:
    """All that a file of configs/ offers: its default first, then every variant."""
    groups = getattr(module(name), "VARIANTS", ())
    chosen = [",".join(filter(None, names)) for names in itertools.product(*groups)]
    return [name, *(f"{name}:{variant}" for variant in chosen[1:])]


def values(config: ConfigDict) -> dict[str, Any]:
    """All fields by their full names, as JSON has them."""
    return json.loads(json.dumps({name: config_value(config, name) for name in app.field_names(config)}))


def config_value(config: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def difference(config: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    assert config.keys() == base.keys()
    return {name: value for name, value in config.items() if value != base[name]}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_its_task_and_its_header_holds_the_command(name: str) -> None:
    config = load(name)
    assert config.is_locked
    model = build_task(config).model
    assert model.num_classes == config.model.num_classes
    header = ast.get_docstring(ast.parse(CONFIGS[name].read_text()))
    assert header is not None
    assert f"python -m halvit_jax.main --config=configs/{name}.py --workdir=runs/{name}" in header
    for variant in re.findall(r"configs/(\w+\.py:[\w,]+)", header):
        load(variant.replace(".py", ""))


def test_every_recipe_has_its_golden_config(recorded: Recorded) -> None:
    """A file's default against the library's, a variant against its file's default."""
    plain = values(default_config())
    assert recorded("default_config.json", plain) == plain
    found = {}
    for name in CONFIGS:
        base, *variants = entries(name)
        found[base] = difference(values(load(base)), plain)
        found |= {entry: difference(values(load(entry)), values(load(base))) for entry in variants}
    assert recorded("configs.json", found) == found


def treatments(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Per family and rules: each parameter, indices as *, with whether it is decayed and the axes that partition it."""
    configs = [load(entry) for name in names for entry in entries(name)]
    for config in configs:
        config.model.drop_path = None
        if config.num_epochs == 30:  # fine-tuning, of the same parameters
            config.model.image_size = None
    found: dict[str, dict[str, set[str]]] = {}
    for config in {(str(config.model), config.optim.no_decay): config for config in configs}.values():
        model = create_model(**config.model)
        rules = found.setdefault(f"{type(model).__name__}, no_decay={' '.join(config.optim.no_decay)}", {})
        params = variable_shapes(model)["params"]
        for path, decayed in flatten(path_mask(params, config.optim.no_decay)).items():
            axes = [axis or "-" if isinstance(axis, str | None) else "+".join(axis) for axis in axes_of(path, model)]
            text = f"{'decayed' if decayed else 'spared'} [{', '.join(axes)}]"
            rules.setdefault(re.sub(r"\d+", "*", path), set()).add(text)
    return {name: {path: " or ".join(sorted(texts)) for path, texts in rules.items()} for name, rules in found.items()}


def axes_of(path: str, model: nn.Module) -> tuple[str | tuple[str, ...] | None, ...]:
    return first_match(path, partition_rules(model))


def test_digits_decay_and_partition_as_recorded(recorded: Recorded) -> None:
    """A small model of every family."""
    golden = recorded("parameters.json", {})
    for rules, paths in treatments(["halvit_digits", "digits", "distill_digits"]).items():
        assert paths.items() <= golden[rules].items()


@pytest.mark.slow  # forty models
def test_every_recipe_decays_and_partitions_as_recorded(recorded: Recorded) -> None:
    found = treatments(CONFIGS)
    assert recorded("parameters.json", found) == found


@pytest.mark.parametrize("name", ["resnet50", "halvit_resnet50"])
def test_a2_is_a_variant_of_the_convolutional_configs(name: str) -> None:
    config = load(f"{name}:a2")
    assert (config.model.name, config.optim.name, config.num_epochs) == (name, "lamb", 300)


def test_variants_are_chosen_by_name_in_any_order() -> None:
    groups = (("s1", "s2"), ("", "distilled", "384"))
    assert choose("", *groups) == ("s1", "")
    assert choose("s2", *groups) == ("s2", "")
    assert choose("384,s2", *groups) == ("s2", "384")


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("s3", "variant 's3' is not one of s1, s2, distilled, 384"),
        ("s2,distilled,384", "variants distilled and 384 exclude each other"),
        ("s1,s1", "variants s1 and s1 exclude each other"),
    ],
)
def test_an_unknown_variant_is_refused_with_the_allowed_names(variant: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(variant, ("s1", "s2"), ("", "distilled", "384"))


@pytest.mark.parametrize(
    ("entry", "teacher", "kind", "layers"),
    [
        ("shvit:distilled", "regnety_160", "hard", ()),
        ("mini_deit:base,distilled", "regnety_160", "soft", ()),
        pytest.param(
            "mini_swin:distilled", "swin_base", "soft_cross_entropy", (1, 3, 5, 7, 9, 11), marks=pytest.mark.slow
        ),
        pytest.param(
            "mini_swin:small,distilled",
            *("swin_base", "soft_cross_entropy", (1, 3, 9, 15, 21, 23)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_distillation_as_published_is_a_variant(entry: str, teacher: str, kind: str, layers: tuple[int, ...]) -> None:
    config = load(entry)
    assert (config.task.name, config.teacher.name, config.distillation.kind) == ("distillation", teacher, kind)
    assert config.distillation.student_layers == layers
    assert config.num_epochs == 300
    config.teacher.init_from = "not there"
    task = abstract_task(config, make_mesh(devices=jax.devices()[:1]))  # student, teacher and layers fit each other
    assert task.frozen["params"]


def rate(config: ConfigDict) -> float:
    return config.optim.learning_rate * config.batch_size / config.optim.base_batch_size


@pytest.mark.parametrize(
    ("entry", "model", "learning_rate", "schedule"),
    [
        ("mini_deit:base,384", "mini_deit_base", 2.5e-6, "constant"),
        ("swin:base,384", "swin_base", 1e-5, "cosine"),
        ("mini_swin:base,384", "mini_swin_base", 1e-5, "cosine"),
        ("nextvit:384", "nextvit_small", 2e-5, "constant"),
        ("shvit:s4,384", "shvit_s4", 4e-3, "cosine"),
    ],
)
def test_fine_tuning_at_384_is_a_variant(entry: str, model: str, learning_rate: float, schedule: str) -> None:
    config = load(entry)
    assert (config.model.name, config.model.image_size, config.num_epochs) == (model, 384, 30)
    assert rate(config) == pytest.approx(learning_rate)
    assert (config.optim.schedule, config.optim.weight_decay, config.task.name) == (schedule, 1e-8, "classification")
    validate(config)
    assert create_model(**config.model).image_size == 384


@pytest.mark.parametrize("name", sorted(imagenet.SHVIT_DECAY))
def test_shvits_are_trained_at_4e_3_with_a_decay_of_their_own(name: str) -> None:
    config = imagenet.shvit(name)
    assert (config.model.name, config.num_epochs, config.batch_size) == (name, 300, 2048)
    assert rate(config) == 4e-3
    assert config.optim.weight_decay == imagenet.shvit(name, variant="distilled").optim.weight_decay
    with pytest.raises(ValueError, match="'deit_tiny' has no published SHViT recipe; one of shvit_s1, shvit_s2"):
        imagenet.shvit("deit_tiny")


@pytest.mark.parametrize(
    ("entry", "drop_path"),
    [("nextvit", 0.1), ("nextvit:base", 0.2), ("nextvit:large", 0.2), ("hmhsa_cffn:nextvit_small", 0.1)],
)
def test_next_vits_are_trained_at_2e_3_in_batches_of_2048(entry: str, drop_path: float) -> None:
    config = load(entry)
    assert (config.num_epochs, config.batch_size, config.model.drop_path) == (300, 2048, drop_path)
    assert rate(config) == 2e-3


def test_halvit_and_its_baseline_on_digits_differ_in_the_model_alone() -> None:
    tied, plain = digits.vit("halvit_tiny"), digits.vit("deit_small")
    plain.model.name = "halvit_tiny"
    assert to_json(tied) == to_json(plain)


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
        ("seed", -1, "seed=-1 must not be negative"),
        ("total_steps", 5, "total_steps=5 and num_epochs=300: set one of them"),
        ("loop.ema_decay", 1.0, r"loop.ema_decay=1.0 must lie in \[0, 1\)"),
        ("compute_dtype", "half", "compute_dtype='half' is not one of auto, float32, bfloat16"),
    ],
)
def test_impossible_values_are_refused(field: str, value: object, message: str) -> None:
    config = imagenet.deit("halvit_tiny")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_an_unknown_override_is_refused_with_the_nearest_name() -> None:
    app.check_overrides(["prog", "--config.model.width=3", "--config=x.py", "--workdir=y"], default_config())
    with pytest.raises(ValueError, match=r"model.widht is no field of the config; did you mean --config.model.width"):
        app.check_overrides(["--config.model.widht=3"], default_config())


# Sub-tree -> the constructors whose keywords it lists. `task` and `teacher` are read field by field.
CONSTRUCTORS: dict[str, Any] = {
    "data": data.make_loaders,
    "classification": Classification.__init__,
    "distillation": Distillation.__init__,
    "loop": loop.train,
    "save": Checkpointer.__init__,
    "optim": make_optimizer,
    "mesh": make_mesh,
    "cluster": distributed.joined,
    "watchdog": Watchdog.__init__,
    "skip_updates": make_limit,
}


def test_every_field_is_read_somewhere() -> None:
    """A field that nothing reads would be a knob that does nothing."""
    config = default_config()
    by_name = {name for path in sources() for name in config_reads(path.read_text())}
    for name, value in config.items():
        if name in CONSTRUCTORS:
            assert set(value) <= used_keywords(CONSTRUCTORS[name]), name
        elif name == "model":
            assert set(value) - {"name"} <= {field for path in sources() for field in self_reads(path.read_text())}
        else:
            fields = {f"{name}.{field}" for field in value} if isinstance(value, ConfigDict) else {name}
            assert fields <= by_name | ({"teacher.name"} if name == "teacher" else set())


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
    package = ROOT / "halvit_jax"
    return [path for path in package.rglob("*.py") if path.name != "config.py" and path.parent.name != "recipes"]


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
    families = {family for family, _ in MODELS.values()}
    types = merge_field_types({family.__name__: fields_of(family) for family in families})
    config = default_config().model
    assert set(config) - {"name"} == set(types) - {"dtype", "folded"}
    for field in set(config) - {"name"}:
        config_type = config.get_type(field)
        assert str(types[field]).startswith(config_type.__name__) or types[field] is config_type, field


def test_two_families_with_one_field_of_two_types_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model.num_heads is int in VisionTransformer and tuple\[int, \.\.\.\] in Other"
    ):
        merge_field_types({"VisionTransformer": {"num_heads": int}, "Other": {"num_heads": tuple[int, ...]}})
