import ast
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import pytest
from flax import linen as nn
from helpers.configs import CONFIGS, entries, load, values
from ml_collections import ConfigDict

from halvit_jax.config import default_config, to_json, validate
from halvit_jax.experiment.tasks import build_task
from halvit_jax.experiment.teacher import abstract_distillation
from halvit_jax.models import create_model, partition_rules
from halvit_jax.recipes import digits, imagenet
from halvit_jax.training.optim import path_mask
from halvit_jax.training.sharding import make_mesh
from halvit_jax.trees import first_match, flatten, variable_shapes

Recorded = Callable[..., dict[str, Any]]


def difference(config: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    assert config.keys() == base.keys()
    return {name: value for name, value in config.items() if value != base[name]}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_its_task_and_its_header_holds_the_command(name: str) -> None:
    config = load(name)
    assert config.is_locked
    if config.task.name != "detection":
        config.model.num_classes = config.model.num_classes or 10  # 0: as many as the folder of images has
    model = build_task(config).model
    assert getattr(model, "backbone", model).num_classes == config.model.num_classes
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
    configs = [config for config in configs if config.task.name != "detection"]  # see detector_treatments
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


def detector_treatments() -> dict[str, dict[str, str]]:
    """`treatments` of the detectors' recipes: all parameters outside of the backbones, and of these the exceptions.

    An exception is spared from the decay or frozen; all others of a backbone are decayed.
    """
    found: dict[str, dict[str, set[str]]] = {}
    for name in CONFIGS:
        for config in map(load, entries(name)):
            if config.task.name != "detection":
                continue
            task, optim = build_task(config), config.optim
            params, _ = jax.eval_shape(task.init, jax.random.key(0))
            decayed, trained = (flatten(path_mask(params, rules)) for rules in (optim.no_decay, optim.frozen))
            rules = f"{config.detection.detector}, no_decay={' '.join(optim.no_decay)}, frozen={' '.join(optim.frozen)}"
            kinds = found.setdefault(rules, {})
            for path in decayed:
                kind = "frozen" if not trained[path] else "decayed" if decayed[path] else "spared"
                if not path.startswith("backbone/"):
                    axes = first_match(path, task.partition_rules)
                    kind += (
                        f" [{', '.join('-' if a is None else a if isinstance(a, str) else '+'.join(a) for a in axes)}]"
                    )
                elif kind == "decayed":
                    continue
                kinds.setdefault(re.sub(r"\d+", "*", path), set()).add(kind)
    return {name: {path: " or ".join(sorted(texts)) for path, texts in kinds.items()} for name, kinds in found.items()}


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


@pytest.mark.slow  # forty detectors
def test_every_recipe_of_detection_decays_freezes_and_partitions_as_recorded(recorded: Recorded) -> None:
    found = detector_treatments()
    assert recorded("detector_parameters.json", found) == found


@pytest.mark.parametrize(
    ("entry", "source", "kind", "layers"),
    [
        ("deit_tiny:distilled", "regnety_160", "hard", ()),
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


@pytest.mark.parametrize(
    "entry", ["finetune", "mini_deit:base,384", "swin:base,384", "mini_swin:base,384", "nextvit:384", "shvit:s4,512"]
)
def test_fine_tuning_at_more_pixels_is_a_variant(entry: str) -> None:
    config = load(entry)
    validate(config)
    assert create_model(**config.model).image_size == (512 if "512" in entry else 384)
    assert (config.num_epochs, config.task.name) == (30, "classification")


@pytest.mark.parametrize("entry", ["swin:tiny,384", "mini_swin:tiny,384"])
def test_swins_at_384_have_tables_of_windows_of_twelve(entry: str) -> None:
    tables = [leaf.shape[0] for path, leaf in shapes(load(entry)).items() if path.endswith("position_bias/table")]
    assert set(tables) == {23**2}


def shapes(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    return flatten(variable_shapes(create_model(**config.model))["params"])


def test_a_model_without_a_published_decay_has_no_shvit_recipe() -> None:
    with pytest.raises(ValueError, match="'deit_tiny' has no published SHViT recipe; one of shvit_s1, shvit_s2"):
        imagenet.shvit("deit_tiny")


def test_halvit_and_its_baseline_on_digits_differ_in_the_model_alone() -> None:
    tied, plain = digits.vit("halvit_tiny"), digits.vit("deit_small")
    plain.model.name = "halvit_tiny"
    assert to_json(tied) == to_json(plain)
