"""Commands that messages tell the reader to type are typed, as printed, into a shell."""

import os
import pathlib
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable

import pytest
import tensorflow as tf
from helpers.processes import ROOT
from packaging.requirements import Requirement

from halvit_jax.analysis import family_benchmark, halve_benchmark, torchvision_benchmark, tpu_topology
from halvit_jax.cli import doctor, drawing
from halvit_jax.convert import readers
from halvit_jax.data import file_formats, rle
from halvit_jax.data.sources import open_source
from halvit_jax.detection import coco_metric
from halvit_jax.recipes import detection
from halvit_jax.text import EXTRAS

VERSION = "999.0"  # of every package of the index below
MODULES = {  # what each message misses: distribution -> module
    "pycocotools": "pycocotools",
    "faster-coco-eval": "faster_coco_eval",
    "huggingface-hub": "huggingface_hub",
    "torch": "torch",
    "matplotlib": "matplotlib",
    "pillow": "PIL",
}


def _webp() -> None:
    file_formats.to_decodable(tf.constant(b"RIFF\0\0\0\0WEBP" + bytes(20)))


def _tfds_folder(folder: pathlib.Path) -> None:
    """The warning about files that were passed over, as an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "halvit_jax.data.sources.image_folder.LOG.warning",
            lambda text, *values: (_ for _ in ()).throw(ValueError(text % values)),
        )
        for name in ("a/x.png", "a/y.webp"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        open_source("folder", "", "train", root=str(folder))


def _exported() -> None:
    from halvit_jax import export

    export.FORMATS["onnx"](None, pathlib.Path("x.onnx"))  # type: ignore[arg-type]


def _lacking() -> None:
    lines = [line for _, line in doctor.package_lines() if "extra     onnx" in line]
    raise ValueError(lines[0])


MESSAGES: dict[str, tuple[Callable[[pathlib.Path], object], tuple[str, ...]]] = {
    "masks of COCO": (lambda folder: rle.coco_masks.__wrapped__(), ("pycocotools",)),
    "metric of COCO": (lambda folder: coco_metric.check_backend("pycocotools"), ("pycocotools",)),
    "faster metric": (lambda folder: coco_metric.check_backend("faster_coco_eval"), ("faster-coco-eval",)),
    "weights of the Hub": (lambda folder: readers.read("hf://me/small"), ("huggingface-hub",)),
    "weights of PyTorch": (lambda folder: readers.read(folder), ("torch",)),
    "drawing": (lambda folder: drawing.check(True, "out", []), ("matplotlib",)),
    "plot of families": (lambda folder: family_benchmark.plot([], folder), ("matplotlib",)),
    "plot of halving": (lambda folder: halve_benchmark.plot([], folder), ("matplotlib",)),
    "TPU compiler": (lambda folder: tpu_topology.tpu_devices(tpu_topology.Topology("v5e", (2, 4))), ("jax", "libtpu")),
    "export": (lambda folder: _exported(), ("jax2onnx", "onnxruntime")),
    "WebP image": (lambda folder: _webp(), ("pillow",)),
    "WebP in a folder": (_tfds_folder, ("pillow",)),
    "torchvision": (
        lambda folder: torchvision_benchmark.TorchvisionMaskRCNN.check(detection.coco("mask_rcnn", "resnet50")),
        ("torch", "torchvision"),
    ),
    "doctor": (lambda folder: _lacking(), ("jax2onnx", "onnxruntime")),
}


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """Type a command into a shell whose pip knows only packages made here; returns what it has installed."""
    index = tmp_path_factory.mktemp("index")
    needed = {Requirement(text) for packages in EXTRAS.values() for text in packages}
    for name in {requirement.name for requirement in needed} | MODULES.keys() | {"libtpu", "torchvision"}:
        _wheel(index, name, "libtpu" if name == "jax" else "")

    def typed(command: str) -> list[str]:
        target = tmp_path_factory.mktemp("installed")
        environment = os.environ | {
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_CONSTRAINT": "",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(index),
            "PIP_TARGET": str(target),
            "PIP_NO_COMPILE": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return sorted(path.name.split("-")[0].replace("_", "-") for path in target.glob("*.dist-info"))

    return typed


def _wheel(index: pathlib.Path, name: str, tpu: str) -> None:
    """A package without a module; its extra `tpu` needs another one."""
    stem = f"{name.replace('-', '_')}-{VERSION}"
    extra = f"Provides-Extra: tpu\nRequires-Dist: {tpu}; extra == 'tpu'\n" if tpu else ""
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n{extra}",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(index / f"{stem}-py3-none-any.whl", "w") as archive:
        for file, content in files.items():
            archive.writestr(f"{stem}.dist-info/{file}", content)
        archive.writestr(f"{stem}.dist-info/RECORD", "".join(f"{stem}.dist-info/{file},,\n" for file in files))


@pytest.mark.parametrize(
    "message", [pytest.param(name, marks=[] if name == "export" else pytest.mark.slow) for name in MESSAGES]
)
def test_the_printed_command_installs_what_is_missing(
    message: str, shell: Callable[[str], list[str]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = _without_packages(message, tmp_path, monkeypatch)
    assert shell(wanted) == sorted(MESSAGES[message][1])


@pytest.mark.parametrize("message", MESSAGES)
def test_no_printed_command_asks_an_index_for_this_package(
    message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is on none, so anybody could register the name."""
    words = shlex.split(_without_packages(message, tmp_path, monkeypatch))
    assert words[:2] == ["pip", "install"]
    assert len(words) > 2
    assert not [word for word in words if word.lower().startswith(("halvit", "-e", "."))]


def _without_packages(message: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The command of a message that is printed where no optional package is installed."""
    monkeypatch.chdir(folder)
    for module in [*MODULES.values(), "pycocotools.coco", "PIL.Image", "jax2onnx", "onnx"]:
        monkeypatch.setitem(sys.modules, module, None)
    find_spec = tpu_topology.importlib.util.find_spec
    monkeypatch.setattr(
        tpu_topology.importlib.util, "find_spec", lambda name: None if name == "libtpu" else find_spec(name)
    )
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    lacking = doctor.lacking
    monkeypatch.setattr(
        doctor, "lacking", lambda given: f"{given.name} is not installed" if "onnx" in given.name else lacking(given)
    )
    given = folder / "x.pth" if message == "weights of PyTorch" else folder
    if given != folder:
        given.write_bytes(b"x")
    with pytest.raises((ValueError, tf.errors.OpError)) as error:
        MESSAGES[message][0](given)
    text = error.value.message if isinstance(error.value, tf.errors.OpError) else str(error.value)
    return text[text.index("pip install") :]


def test_every_message_that_names_pip_is_among_these() -> None:
    files = [
        str(path.relative_to(ROOT / "halvit_jax"))
        for path in sorted((ROOT / "halvit_jax").rglob("*.py"))
        if "pip_install(" in path.read_text() and path.name != "text.py"
    ]
    assert files == [
        "analysis/family_benchmark.py",
        "analysis/halve_benchmark.py",
        "analysis/torchvision_benchmark.py",
        "analysis/tpu_topology.py",
        "cli/doctor.py",
        "cli/drawing.py",
        "convert/hub.py",
        "convert/readers.py",
        "data/file_formats.py",
        "data/rle.py",
        "data/sources/image_folder.py",
        "detection/coco_metric.py",
        "export.py",
    ]
    for path in sorted((ROOT / "halvit_jax").rglob("*.py")):
        for line in path.read_text().splitlines():
            assert not ("pip install" in line and ('f"' in line or "Error(" in line)), f"{path}: {line.strip()}"
