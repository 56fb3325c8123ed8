"""Commands, configs, fields and flags that README, CONTRIBUTING and docs/ name are run, or are valid and listed."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from absl import flags
from helpers.pages import PARTS, ROOT, blocks, spans
from ml_collections import ConfigDict, config_flags

from halvit_jax import config as config_lib
from halvit_jax.cli.config_files import resolve_flags

STARTS = ("python -m ", "bash ", "sbatch ", "tensorboard ", "pip ", "source ")

MAIN, CHECK = "python -m halvit_jax.main", "python -m halvit_jax.check"
DIGITS_RUN = "--config=configs/halvit_digits.py --workdir=runs/halvit_digits"
SHORT = "--config.total_steps=4 --config.loop.eval_every=4 --config.loop.checkpoint_every=4"
SHORT = f"{SHORT} --config.optim.warmup_epochs=0.0"
SCENES_RUN = "--config=configs/scenes_mask_rcnn.py --workdir=runs/scenes_mask_rcnn"
SHORT_SCENES = "--config.total_steps=4 --config.loop.eval_every=4 --config.loop.checkpoint_every=4"
SHORT_SCENES = f"{SHORT_SCENES} --config.optim.warmup_steps=2 --config.instances.data_dir=scenes"
SMALL = f"{SHORT} --config.num_epochs=0 --config.batch_size=8 --config.data.virtual_shards=1"
SMALL = f"{SMALL} --config.model.image_size=32 --config.model.patch_size=8 --config.model.width=24"
SMALL = f"{SMALL} --config.model.depth=1 --config.model.num_heads=2"

# Commands that `test_the_documented_commands_run` runs, in this order, with the flags behind them.
RUN = {
    f"{MAIN} {DIGITS_RUN}": SHORT,
    f"{MAIN} --config=configs/vit_digits.py --workdir=runs/vit_digits": SHORT,
    f"{MAIN} --config=configs/vit_digits.py --workdir=runs/vit_digits --config.total_steps=2200 "
    "--config.loop.eval_every=550 --config.loop.checkpoint_every=550": f"--workdir=runs/teacher {SHORT}",
    f"{MAIN} --config=configs/halvit_digits.py --workdir=runs/alone": SHORT,
    f"{MAIN} --config=configs/distill_digits.py --workdir=runs/distill_digits": SHORT,
    f"{MAIN} --config=configs/distill_digits.py --workdir=runs/hard": SHORT,
    f"{MAIN} --config=configs/distill_digits.py:soft --workdir=runs/soft": SHORT,
    "python -m halvit_jax.halve --config=configs/halve_digits.py --out=runs/halve_digits.safetensors": (
        "--images=64 --fit_steps=4"
    ),
    f"{MAIN} --config=configs/halve_digits.py --workdir=runs/halve_digits": SHORT,
    f"{MAIN} --config=configs/halvit_digits.py --workdir=runs/guarded --config.skip_updates.norm_factor=20": SHORT,
    f"{MAIN} --config=configs/halvit_digits.py --workdir=runs/seed1 --config.seed=1 --config.save.keep=3": SHORT,
    f"{MAIN} --config=configs/digits.py:shvit --workdir=runs/shvit_digits": SHORT,
    f"{MAIN} --config=configs/digits.py:mini_deit --workdir=runs/mini_deit_digits --config.total_steps=2200 "
    "--config.loop.eval_every=550 --config.loop.checkpoint_every=550": SHORT,
    f"{MAIN} --config=configs/finetune_digits.py --workdir=runs/finetune_digits": SHORT,
    f"{MAIN} --config=configs/halvit_folder.py --workdir=runs/mine --config.data.root=DIR": SMALL,
    f"{CHECK} --config=configs/halvit_digits.py": "",
    f"{CHECK} --workdir=runs/halvit_digits": "",
    "python -m halvit_jax.predict --workdir=runs/halvit_digits a.png b.jpg": "",
    "python -m halvit_jax.predict --workdir=runs/halvit_digits --attention=out.png a.png": "",
    "python -m halvit_jax.export --workdir=runs/halvit_digits --format=stablehlo --out=digits.zip": "",
    f"{MAIN} {SCENES_RUN}": SHORT_SCENES,
    "python -m halvit_jax.bench --what=detect --config=configs/scenes_mask_rcnn.py --batch=2": "--repeats=1",
    f"{MAIN} {SCENES_RUN} --mode=eval --detections=found.json": SHORT_SCENES,
    "python -m halvit_jax.predict --workdir=runs/scenes_mask_rcnn --draw=out a.png": "",
    "python -m halvit_jax.export --workdir=runs/scenes_mask_rcnn --format=stablehlo --out=detector.zip": "",
    "python -m halvit_jax.bench --what=input": "--batch=4 --repeats=1",
    "python -m halvit_jax.bench --models=halvit_tiny,deit_small --batch=8": "--batch=1 --repeats=1",
    "python -m halvit_jax.bench --models=halvit_tiny,deit_small,resnet50 --batch=8": "--batch=1 --repeats=1",
    "python -m halvit_jax.bench --models=shvit_s1 --batch=16": "--batch=1 --repeats=1",
    "python -m halvit_jax.bench --what=families": "--families=HaLViT --steps=4 --seeds=1",
    "python -m halvit_jax.summary": "halvit_tiny",
    "python -m halvit_jax.summary --markdown": "halvit_tiny",
}
# Python of these pages, run afterwards.
RUN_PYTHON = ("README.md", "docs/api.md", "docs/export.md")
# Commands that this file does not run, and what they need.
OWN = "photos, which tests/repository/test_own_data.py makes and runs it with"
IMAGENET, NETWORK = "prepared ImageNet and days of an accelerator", "packages from the network, a new .venv"
NEEDS = {
    "bash launch/quickstart.sh": NETWORK,
    "bash launch/test.sh": f"{NETWORK}; it runs the tests",
    "bash launch/test.sh -m slow tests/convert": NETWORK,
    'bash launch/test.sh -m "slow or not slow"': f"{NETWORK}, hours",
    "bash launch/docs.sh": NETWORK,
    "source .venv/bin/activate": "a .venv",
    "tensorboard --logdir=runs": "somebody who looks",
    "pip install pre-commit && pre-commit install": NETWORK,
    "pip install .": NETWORK,
    "halvit doctor": "an installed package",
    "halvit train --config=halvit_digits --workdir=runs/halvit_digits": "an installed package; test_wheel.py runs it",
    'pip install "jax[tpu]"': NETWORK,
    'pip install "jax[cuda12]"': NETWORK,
    "pip install -e '.[onnx,torch]'": NETWORK,
    "pip install -e '.[onnx]'": NETWORK,
    "pip install -e '.[hub]'": NETWORK,
    "pip install -e '.[gcs]'": NETWORK,
    "gcloud auth application-default login": "an account at Google",
    f"{MAIN} --config=configs/halvit_digits.py --workdir=gs://BUCKET/runs/a --config.data.data_dir=gs://BUCKET/tfds": (
        "a bucket; tests/faults/test_buckets.py runs it against a server of the same API"
    ),
    "pip install -e '.[plot]'": NETWORK,
    "python -m halvit_jax.plan --config=configs/coco_mask_rcnn.py --topology=v5e:4x4 --config.batch_size=64": (
        "the TPU compiler, half an hour"
    ),
    "pip install -e '.[detection]'": NETWORK,
    f"{MAIN} --config=configs/coco_mask_rcnn.py:resnet50 --workdir=runs/mine --config.instances.root=DIR "
    "--config.instances.train_annotations=annotations/train.json "
    "--config.instances.eval_annotations=annotations/val.json --config.instances.train_images=train "
    "--config.instances.eval_images=val --config.detection.num_classes=3 --config.init_from=resnet50.safetensors "
    "--config.batch_size=4": "images and their annotation files, weights of a ResNet-50",
    "pip install -e '.[torch]'": NETWORK,
    "python -m pytest tests --update-golden": "a change of golden files",
    "python -m pytest tests/repository/test_configs.py --update-golden": "a change of golden files",
    "bash launch/prepare_imagenet.sh TARS_DIR ~/tensorflow_datasets": "the official archives, 150 GB",
    f"{MAIN} --config=configs/NAME.py --workdir=DIR": "a name",
    f"{MAIN} --config=configs/NAME.py --workdir=DIR --mode=eval": "a name",
    f"{MAIN} --config=configs/NAME.py --mode=eval --config.init_from=FILE": "a name",
    f"{MAIN} --mode=eval --config=configs/shvit.py:s4 --config.init_from=shvit_s4.pth "
    "--config.data.evals=\"('v2=imagenet_v2:test','real=imagenet2012_real:validation')\"": (
        "prepared ImageNet, -V2 and -ReaL, SHViT's weights, PyTorch"
    ),
    f"{MAIN} --mode=eval --config=configs/shvit.py:s4 --config.init_from=shvit_s4.pth --config.data.name=folder "
    "--config.data.root=DIR --config.data.eval_split=val": "ImageNet as a folder, SHViT's weights, PyTorch",
    f"{MAIN} --config=configs/halvit_tiny.py --workdir=runs/halvit_tiny": IMAGENET,
    f"{MAIN} --config=configs/halvit_tiny.py --workdir=runs/halvit_tiny "
    "--config.data.evals=\"('v2=imagenet_v2:test',)\"": f"{IMAGENET}, prepared ImageNet-V2",
    f"{MAIN} --config=configs/halvit_tiny.py --workdir=runs/wide --config.batch_size=256 --config.model.drop_path=0.2 "
    "--config.optim.weight_decay=0.1": IMAGENET,
    f"{MAIN} --config=configs/halvit_small.py --workdir=runs/halvit_small --config.mesh.fsdp=4": (
        f"{IMAGENET}, 4 devices"
    ),
    f"{MAIN} --config=configs/hmhsa_cffn.py --workdir=runs/hmhsa_cffn": IMAGENET,
    f"{MAIN} --config=configs/hmhsa_cffn.py --workdir=runs/maps --config.model.hallucinate=maps "
    "--config.model.ffn_rank=1.0": IMAGENET,
    f"{MAIN} --config=configs/shvit.py:s1,distilled --workdir=runs/shvit_s1_distilled "
    "--config.teacher.init_from=regnety_160.safetensors": f"{IMAGENET}, a teacher's weights",
    f"{MAIN} --config=configs/halvit_tiny.py --workdir=runs/flowers --config.data.name=oxford_flowers102 "
    "--config.data.eval_split=test --config.model.num_classes=102 --config.batch_size=256": "prepared flowers, hours",
    f"{MAIN} --config=configs/finetune.py --workdir=runs/flowers --config.init_from=deit_base.pth "
    "--config.data.name=oxford_flowers102 --config.data.eval_split=test --config.model.num_classes=102": (
        "prepared flowers, DeiT's weights, PyTorch"
    ),
    f"{CHECK} --config=configs/halvit_tiny.py --workdir=DIR": IMAGENET,
    "python -m halvit_jax.bench --what=halve --plot=docs/images/halve.svg": "an hour",
    "python -m halvit_jax.bench --what=signs --seeds=5": "half an hour",
    "python -m halvit_jax.halve --config=configs/halvit_tiny.py --teacher=deit_small.pth "
    "--config.teacher.name=deit_small --images=1000 --fit_steps=0 --out=runs/deit_small_attention.safetensors": (
        "prepared ImageNet, DeiT's weights, PyTorch"
    ),
    "python -m halvit_jax.plan --config=configs/halvit_tiny.py --topology=v5e:4x4": "jax[tpu]",
    "python -m halvit_jax.plan --config=configs/deit_small.py --topology=v5e:2x4 --config.batch_size=1024 "
    "--config.model.depth=2 --config.model.attention_impl=xla --config.model.ffn_impl=xla --json": "jax[tpu]",
    "python -m halvit_jax.plan --config=configs/halvit_tiny.py --topology=v5e:4x4 --config.batch_size=4096": "jax[tpu]",
    "python -m halvit_jax.convert deit_tiny.pth deit_tiny.safetensors --model=deit_tiny": "DeiT's weights, PyTorch",
    "python -m halvit_jax.convert hf://timm/deit_small_patch16_224.fb_in1k deit_small.safetensors": NETWORK,
    "python -m halvit_jax.convert mine.safetensors deit.safetensors --model=halvit_tiny --to=deit": "weights",
    "bash launch/gpu.sh --config=configs/halvit_tiny.py --workdir=DIR": f"{IMAGENET}, GPUs",
    "bash launch/tpu_vm.sh NAME ZONE -- --config=configs/halvit_tiny.py --workdir=DIR": f"{IMAGENET}, a TPU",
    "sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh --config=configs/halvit_tiny.py --workdir=DIR": (
        f"{IMAGENET}, SLURM"
    ),
    f"{CHECK} --config=configs/halvit_folder.py --config.data.root=PHOTOS": OWN,
    f"{MAIN} --config=configs/halvit_folder.py --workdir=runs/photos --config.data.root=PHOTOS "
    "--config.data.on_bad_image=replace": OWN,
    f"{MAIN} --config=runs/photos --workdir=runs/photos --mode=eval --step=best --predictions=predictions.csv": OWN,
    "python -m halvit_jax.predict --workdir=runs/photos --step=best NEW": OWN,
    "python -m halvit_jax.export --workdir=runs/photos --step=best --format=stablehlo --out=photos.zip": OWN,
    f"{MAIN} --config=configs/halvit_digits.py --workdir=runs/seen --config.model.depth=2 --config.total_steps=120 "
    "--config.loop.eval_every=60 --config.loop.log_every=20 --config.optim.warmup_epochs=0.0": (
        "terminals of two widths, which tests/repository/test_terminal.py opens"
    ),
    "bash launch/gpu_check.sh --out=gpu": "a GPU, PyTorch and timm",
    "bash launch/local_cluster.sh 4 -- --config=configs/halvit_digits.py --workdir=DIR": "4 processes, minutes",
}


def commands(text: str) -> list[str]:
    """Every command of a page: a line of a block of shell, or a piece of code that starts like a command."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    found = [" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines]
    return [line for line in found if line] + [
        code for code in spans(text) if code.startswith(STARTS) and not re.search(r"<\w+>|=\.\.\.", code)
    ]


COMMANDS = {command: page.name for page, text in PARTS.items() for command in commands(text)}
OURS = [command for command in COMMANDS if "halvit_jax." in command or " --config=" in command]


def parsed(command: str) -> ConfigDict:
    """The config of a command, overridden as on the command line."""
    values = flags.FlagValues()
    words = resolve_flags(["command", *(word for word in shlex.split(command) if word.startswith("--config"))])
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=words)
    values(words)
    return values.config


def get_config(name: str, variant: str | None) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*([variant] if variant else []))


def known_flags(module: str) -> set[str]:
    """The flags that a command defines, by its source."""
    path = ROOT / "halvit_jax" / module
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    sources = [path.read_text()]
    sources += [(ROOT / "halvit_jax/distributed.py").read_text()] if "distributed.define_flags()" in sources[0] else []
    return set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", "".join(sources)))


def test_every_command_is_run_by_a_test_or_listed_with_what_it_needs() -> None:
    assert {command: page for command, page in COMMANDS.items() if command not in RUN | NEEDS} == {}
    assert [command for command in RUN | NEEDS if command not in COMMANDS] == []
    assert not RUN.keys() & NEEDS.keys()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # by which ml_collections reads a config
@pytest.mark.parametrize("command", OURS)
def test_every_command_has_flags_that_exist_and_a_config_that_is_valid(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = re.search(r"halvit_jax\.(\w+)", command)
    known = known_flags(module[1] if module else "main")
    used = [word.removeprefix("--").split("=")[0] for word in shlex.split(command) if word.startswith("--")]
    launcher = {"nodes", "gpus-per-node", ""} if command.startswith("sbatch") else {""}  # "": --
    assert {name for name in used if not name.startswith("config.")} <= known | launcher
    if "--config=configs/" in command and "configs/NAME" not in command:
        monkeypatch.chdir(ROOT)
        config_lib.validate(parsed(command))


def test_every_config_that_is_named_exists_with_its_variant() -> None:
    named = {
        match for text in PARTS.values() for match in re.findall(r"configs/([a-z]\w*)\.py(?::(\w+(?:,\w+)*))?", text)
    }
    assert ("shvit", "s2,distilled") in named
    for name, variant in sorted(named):
        assert get_config(name, variant or None).is_locked, f"configs/{name}.py:{variant}"


def test_every_field_and_flag_that_is_named_exists() -> None:
    config = config_lib.default_config()
    fields = {".".join(path) for path in _paths(config.to_dict())}
    for page, text in PARTS.items():
        if page.name == "CHANGELOG.md" or page.name == "changelog.md":
            continue  # names old fields too
        for name in re.findall(r"--config\.([\w.]+)=", text):
            assert name in fields, f"{page.name}: --config.{name}"
        for code in spans(text):
            tree = code.split(".")[0]
            if re.fullmatch(r"[a-z_]+\.(?!json)[a-z_]+", code) and isinstance(config.get(tree), ConfigDict):
                assert code in fields | {"config.validate", "task.loss"}, f"{page.name}: {code}"


def _paths(tree: dict, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _paths(value, (*prefix, name))
        else:
            yield (*prefix, name)


@pytest.mark.slow
def test_the_documented_commands_run(tmp_path: pathlib.Path) -> None:
    """Every command of `RUN` in a folder of its own, then the Python of the pages."""
    from halvit_jax import data

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    random = np.random.default_rng(0)
    folders = [tmp_path / "DIR" / split / name for split in ("train", "val") for name in "abcde"]
    for number, folder in enumerate([tmp_path, *folders]):
        folder.mkdir(parents=True, exist_ok=True)
        names = ("a.png", "b.jpg") if number == 0 else [f"{i}.png" for i in range(8)]
        for name in names:
            data.write_png(str(folder / name), random.integers(0, 256, (32, 40, 3), np.uint8))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for command, more in RUN.items():
        words = [sys.executable, *shlex.split(command)[1:], *shlex.split(more)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    result = json.loads((tmp_path / "runs/halvit_digits/result.json").read_text())
    assert f"{result['params']:,}" in (ROOT / "README.md").read_text()
    for page in RUN_PYTHON:
        source = "\n".join(blocks((ROOT / page).read_text(), "python"))
        images = "import numpy as np\nimages = np.zeros((1, 8, 8, 3), np.uint8)\n" if page == "docs/export.md" else ""
        words = [sys.executable, "-c", images + source]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, f"{page}\n{done.stderr[-2000:]}"
