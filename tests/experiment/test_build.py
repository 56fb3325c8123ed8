"""From a config to the parts of a run."""

import pathlib

import jax
import pytest
from helpers.runs import tiny

from halvit_jax.experiment import build
from halvit_jax.recipes import detection, digits
from halvit_jax.training.sharding import make_mesh
from halvit_jax.trees import flatten


def test_a_run_is_built_from_the_fields_of_its_config(digits_dir: pathlib.Path) -> None:
    run = build.build(tiny(digits_dir, **{"mesh.fsdp": 2, "data.evals": ("again=digits:test",)}))
    assert dict(run.mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert build.input_size(run.task) == (8, 8)
    assert run.total_steps == 8
    assert list(run.loaders.evals) == ["eval", "eval_again"]
    abstract, fresh = run.abstract_state(), run.fresh_state(run.abstract_state())
    assert {path: leaf.sharding for path, leaf in flatten(fresh).items()} == {
        path: leaf.sharding for path, leaf in flatten(abstract).items()
    }
    assert run.distillation is None


def test_averages_are_in_the_state_if_they_are_kept(digits_dir: pathlib.Path) -> None:
    for decay, kept in ((0.9, True), (0.0, False)):
        config = tiny(digits_dir, **{"loop.ema_decay": decay})
        task = build.build_task(config)
        optimizer = build.build_optimizer(config, steps_per_epoch=4)
        assert bool(jax.tree.leaves(build.build_abstract_state(config, task, optimizer, make_mesh()).ema)) == kept


def test_the_length_of_a_run_is_given_in_steps_or_epochs() -> None:
    config = digits.vit("halvit_tiny")
    config.update({"total_steps": 0, "num_epochs": 3})
    assert build.total_steps(config, steps_per_epoch=11) == 33
    config.update({"total_steps": 5, "num_epochs": 0})
    assert build.total_steps(config, steps_per_epoch=11) == 5


@pytest.mark.parametrize(
    ("scaling", "effect"),
    [
        ("none", "leaves the learning rate as it is"),
        ("linear", "multiplies the learning rate by 64/512"),
        ("sqrt", r"multiplies the learning rate by sqrt(64/512)"),
    ],
)
def test_a_batch_size_that_is_not_the_recipes_is_a_deviation(scaling: str, effect: str) -> None:
    config = digits.vit("halvit_tiny")
    fields = {"batch_size": 64, "recipe_batch_size": 256, "optim.scaling": scaling, "optim.base_batch_size": 512}
    config.update_from_flattened_dict(fields)
    (line,) = build.recipe_deviations(config)
    assert line.startswith("batch_size=64, but this recipe was made for 256; ")
    assert effect in line
    config.batch_size = 256
    assert build.recipe_deviations(config) == []


def test_a_detector_on_coco_without_the_weights_of_its_backbone_is_a_deviation() -> None:
    config = detection.coco("mask_rcnn", "resnet50")
    (line,) = build.recipe_deviations(config)
    assert line == (
        "init_from is not set, so resnet50 starts from random weights, and its BatchNorms, if it has any, never learn "
        "statistics; set init_from to its ImageNet run or weight file"
    )
    config.detection.train_norms = True
    assert build.recipe_deviations(config)[0].startswith(
        "init_from is not set, so resnet50 starts from random weights;"
    )
    config.init_from = "resnet50.safetensors"
    assert build.recipe_deviations(config) == []
    assert build.recipe_deviations(detection.scenes("mask_rcnn", "halvit_tiny")) == []


def test_a_number_of_classes_of_0_is_that_of_the_data(digits_dir: pathlib.Path) -> None:
    config = tiny(digits_dir, **{"model.num_classes": 0})
    assert build.with_num_classes(config).model.num_classes == 10
    assert config.model.num_classes == 0
    config.model.num_classes = 7
    assert build.with_num_classes(config) is config


def test_the_compilation_cache_is_where_the_config_says(
    digits_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to = {}
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr(jax.config, "update", lambda name, value: set_to.update({name: value}))
    build.build(tiny(digits_dir, compilation_cache="~/cache"))
    assert set_to["jax_compilation_cache_dir"] == "/home/someone/cache"
