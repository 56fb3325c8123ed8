import ast
import importlib.util
import json
import pathlib
from typing import Any

import jax
import pytest
from helpers.tiers import CORE, tiered
from ml_collections import ConfigDict

from halvit_jax.cli import app
from halvit_jax.config import default_config, from_json, to_json, validate
from halvit_jax.experiment.tasks import build_task
from halvit_jax.experiment.teacher import abstract_task
from halvit_jax.models import create_model
from halvit_jax.recipes import digits, imagenet
from halvit_jax.training.optim import path_mask
from halvit_jax.training.sharding import make_mesh
from halvit_jax.trees import flatten

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
GOLDEN = ROOT / "tests" / "golden"


def load(path: pathlib.Path, *arguments: str) -> ConfigDict:
    """The config of a file, read as the flag reads it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_its_task_and_says_how_it_is_run(path: pathlib.Path) -> None:
    config = load(path)
    assert config.is_locked
    model = build_task(config).model
    assert model.num_classes == config.model.num_classes
    header = ast.get_docstring(ast.parse(path.read_text()))
    assert header is not None
    assert f"python -m halvit_jax.main --config=configs/{path.name} --workdir=runs/{path.stem}" in header


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_what_it_was(path: pathlib.Path) -> None:
    """The whole config as text; after a change that is meant, write `to_json` of it to the golden file."""
    assert to_json(load(path)) + "\n" == (GOLDEN / "configs" / f"{path.stem}.json").read_text()


@pytest.mark.parametrize("name", tiered([path.stem for path in CONFIGS], CORE | {"halvit_digits"}))
def test_what_a_config_decays_is_what_it_was(name: str) -> None:
    """Every parameter with how it is treated; the golden file is this text."""
    config = load(ROOT / "configs" / f"{name}.py")
    params = jax.eval_shape(build_task(config).init, jax.random.key(0))[0]
    mask = flatten(path_mask(params, config.optim.no_decay))
    text = "".join(f"{'decayed' if decayed else 'spared '} {name}\n" for name, decayed in mask.items())
    assert text == (GOLDEN / "decay" / f"{name}.txt").read_text()


def test_the_recipe_is_an_argument_of_the_convolutional_configs() -> None:
    for name in ("resnet50", "halvit_resnet50"):
        config = load(ROOT / "configs" / f"{name}.py", "a2")
        assert (config.model.name, config.optim.name, config.num_epochs) == (name, "lamb", 300)
    with pytest.raises(ValueError, match="recipe 'a1' is not one of v1, a2"):
        imagenet.resnet("resnet50", "a1")


def test_epochs_are_an_argument_of_the_config_file() -> None:
    assert load(ROOT / "configs" / "halvit_tiny.py", "600").num_epochs == 600


@pytest.mark.parametrize(
    ("name", "teacher", "kind", "layers"),
    [
        ("shvit_s1", "regnety_160", "hard", ()),
        ("mini_deit_base", "regnety_160", "soft", ()),
        pytest.param("mini_swin_tiny", "swin_base", "soft_cross_entropy", (1, 3, 5, 7, 9, 11), marks=pytest.mark.slow),
        pytest.param(
            "mini_swin_small", "swin_base", "soft_cross_entropy", (1, 3, 9, 15, 21, 23), marks=pytest.mark.slow
        ),
    ],
)
def test_distillation_as_published_is_an_argument(name: str, teacher: str, kind: str, layers: tuple[int, ...]) -> None:
    config = load(ROOT / "configs" / f"{name}.py", "distilled")
    assert (config.task.name, config.teacher.name, config.distillation.kind) == ("distillation", teacher, kind)
    assert config.distillation.student_layers == layers
    assert config.num_epochs == 300
    config.teacher.init_from = "not there"
    task = abstract_task(config, make_mesh(devices=jax.devices()[:1]))  # student, teacher and layers fit each other
    assert task.frozen["params"]


@pytest.mark.parametrize(
    ("name", "rate", "schedule"),
    [
        ("mini_deit_base", 2.5e-6, "constant"),
        ("swin_base", 1e-5, "cosine"),
        ("mini_swin_base", 1e-5, "cosine"),
        ("nextvit_small", 2e-5, "constant"),
    ],
)
def test_fine_tuning_at_384_is_an_argument(name: str, rate: float, schedule: str) -> None:
    config = load(ROOT / "configs" / f"{name}.py", "384")
    assert (config.model.name, config.model.image_size, config.num_epochs) == (name, 384, 30)
    assert config.optim.learning_rate * config.batch_size / config.optim.base_batch_size == pytest.approx(rate)
    assert (config.optim.schedule, config.optim.weight_decay, config.task.name) == (schedule, 1e-8, "classification")
    validate(config)
    assert create_model(**config.model).image_size == 384


@pytest.mark.parametrize("name", sorted(imagenet.SHVIT_DECAY))
def test_shvits_are_trained_at_4e_3_with_a_decay_of_their_own(name: str) -> None:
    config = load(ROOT / "configs" / f"{name}.py", "30")
    assert (config.model.name, config.num_epochs, config.batch_size) == (name, 30, 2048)
    assert config.optim.learning_rate * config.batch_size / config.optim.base_batch_size == 4e-3
    assert config.optim.weight_decay == load(ROOT / "configs" / f"{name}.py", "distilled").optim.weight_decay
    with pytest.raises(ValueError, match="'deit_tiny' has no published SHViT recipe; one of shvit_s1, shvit_s2"):
        imagenet.shvit("deit_tiny")


@pytest.mark.parametrize("pixels", [384, 512])
def test_shvits_are_fine_tuned_at_4e_3_at_more_pixels(pixels: int) -> None:
    config = load(ROOT / "configs" / "shvit_s4.py", str(pixels))
    assert (config.model.name, config.model.image_size, config.num_epochs) == ("shvit_s4", pixels, 30)
    assert config.optim.learning_rate * config.batch_size / config.optim.base_batch_size == 4e-3
    assert config.optim.weight_decay == 1e-8
    validate(config)


@pytest.mark.parametrize(("name", "drop_path"), [("small", 0.1), ("base", 0.2), ("large", 0.2), ("small_hc", 0.1)])
def test_next_vits_are_trained_at_2e_3_in_batches_of_2048(name: str, drop_path: float) -> None:
    config = load(ROOT / "configs" / f"nextvit_{name}.py", "30")
    assert (config.model.name, config.num_epochs, config.batch_size) == (f"nextvit_{name}", 30, 2048)
    assert config.optim.learning_rate * config.batch_size / config.optim.base_batch_size == 2e-3
    assert config.model.drop_path == drop_path


def test_the_twins_on_digits_differ_in_the_model_alone() -> None:
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


def test_every_field_is_read_somewhere() -> None:
    """A field that nothing reads would be a knob that does nothing."""
    names = {node.attr for path in (ROOT / "halvit_jax").rglob("*.py") for node in _walk(path, ast.Attribute)}
    keywords = {node.arg for path in (ROOT / "halvit_jax").rglob("*.py") for node in _walk(path, ast.arg)}
    fields = {
        node.target.id
        for path in (ROOT / "halvit_jax" / "models").glob("*.py")
        for node in _walk(path, ast.AnnAssign)
        if isinstance(node.target, ast.Name)
    }
    for field in app.field_names(default_config()):
        subtree, _, name = field.rpartition(".")
        assert name in (names if not subtree else keywords | fields), field


def _walk(path: pathlib.Path, kind: type) -> list:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind)]
