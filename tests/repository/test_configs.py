import ast
import importlib.util
import itertools
import json
import pathlib
import re
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from halvit_jax.cli import app
from halvit_jax.config import default_config, to_json, validate
from halvit_jax.experiment.tasks import build_task
from halvit_jax.experiment.teacher import abstract_distillation
from halvit_jax.models import create_model, partition_rules
from halvit_jax.recipes import digits, imagenet
from halvit_jax.training.optim import path_mask
from halvit_jax.training.sharding import make_mesh
from halvit_jax.trees import first_match, flatten, variable_shapes

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}
Recorded = Callable[..., dict[str, Any]]


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
    golden = recorded("parameters.json")
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


@pytest.mark.parametrize(
    ("entry", "source", "kind", "layers"),
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
def test_distillation_as_published_is_a_variant(entry: str, source: str, kind: str, layers: tuple[int, ...]) -> None:
    config = load(entry)
    assert (config.task.name, config.teacher.name, config.distillation.kind) == ("distillation", source, kind)
    assert config.distillation.student_layers == layers
    assert config.num_epochs == 300
    config.teacher.init_from = "not there"
    # Student, teacher and layers fit each other.
    task = abstract_distillation(config, make_mesh(devices=jax.devices()[:1]))
    assert task.constants["params"]


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
