"""Models taken out of their runs, and used without this package."""

import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.processes import ONE_DEVICE, run_command
from helpers.runs import Finished

import halvit_jax
from halvit_jax import export
from halvit_jax.convert import weights_file
from halvit_jax.data import hide_accelerators
from halvit_jax.experiment import build
from halvit_jax.experiment.trained import load_trained
from halvit_jax.protocols import ServingModel

EXPORT = "halvit_jax.export"
EMPTY = SimpleNamespace(node=[])


@pytest.fixture(scope="module")
def digits(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """images.npy and logits.npy: all test digits as uint8 images, and what the trained model says of them."""
    trained = load_trained(finished[0])
    hide_accelerators()
    loader = build.build_loaders(trained.config, size=(8, 8)).evals["eval"]
    batches = [{name: value[batch["mask"]] for name, value in batch.items()} for batch in loader.batches()]
    images = np.concatenate([batch["image"] for batch in batches])
    assert len(images) == 364
    folder = tmp_path_factory.mktemp("digits")
    np.save(folder / "images.npy", images)
    np.save(folder / "logits.npy", np.asarray(trained.task.predict(*trained.variables, {"image": images})))
    return folder


STABLEHLO = """
import sys, json, zipfile, jax, jax.export, numpy as np
with zipfile.ZipFile("FILE") as archive:
    call = jax.export.deserialize(bytearray(archive.read("model.bin"))).call
    info = json.loads(archive.read("info.json"))
"""
ONNX = """
import sys, json, onnxruntime, numpy as np
session = onnxruntime.InferenceSession("FILE", providers=["CPUExecutionProvider"])
call = lambda images: session.run(["logits"], {"images": images})[0]
info = json.loads(session.get_modelmeta().custom_metadata_map["info"])
"""
REST = """
images = np.load("images.npy")
for some in (images, images[:3]):
    logits = np.asarray(call(some))
    assert logits.shape == (len(some), 10)
np.testing.assert_allclose(np.asarray(call(images)), np.load("logits.npy"), atol=1e-4)
assert (np.asarray(call(images)).argmax(-1) == np.load("logits.npy").argmax(-1)).all()
assert "halvit_jax" not in sys.modules
print(json.dumps(info))
"""


@pytest.mark.parametrize(("kind", "suffix", "program"), [("stablehlo", "zip", STABLEHLO), ("onnx", "onnx", ONNX)])
def test_an_exported_model_gives_the_same_logits_without_this_package(
    kind: str, suffix: str, program: str, finished: Finished, digits: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    if kind == "onnx":
        pytest.importorskip("jax2onnx", reason="in the extra [onnx], which holds orbax-checkpoint below 0.11.37")
    out = tmp_path / f"model.{suffix}"
    logged = run_command(EXPORT, f"--workdir={finished[0]}", f"--format={kind}", f"--out={out}").stdout.splitlines()
    assert logged[0] == f"{out}: {out.stat().st_size:,} bytes"
    assert "the same best answer for 364 of the 364 images" in logged[2]
    assert " ms exported, " in logged[3]
    program = program.replace("FILE", str(out)) + REST
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=digits,
        env=os.environ | {"XLA_FLAGS": ONE_DEVICE},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["classes"] == [str(i) for i in range(10)]
    assert (info["model"], info["image_size"], info["crop"]) == ("halvit_tiny", 8, 1.0)
    assert info["resize"] == "short_side"
    assert (info["mean"], info["std"], info["interpolation"]) == ([0.5] * 3, [0.5] * 3, "bilinear")
    params = finished[1]["params"]
    assert 4 * params < out.stat().st_size < 4 * params + 150_000  # every parameter once


def test_exported_safetensors_are_read_by_load(
    finished: Finished, digits: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "model.safetensors"
    trained = load_trained(finished[0])
    written = export.export(trained, "safetensors", out)
    lines = export.verify_export(trained, written, out)
    assert "largest difference of the output: 0.0e+00" in lines
    model, variables = halvit_jax.load(out)
    images = np.load(digits / "images.npy").astype(np.float32)
    logits = model.apply(variables, (images / 255 - 0.5) / 0.5, train=False)
    np.testing.assert_allclose(logits, np.load(digits / "logits.npy"), atol=1e-5)
    assert weights_file.load(out).name == "halvit_tiny"
    params = finished[1]["params"]
    assert out.stat().st_size < 4 * params + 10_000


def test_a_tied_kernel_is_one_constant(finished: Finished) -> None:
    trained = load_trained(finished[0])
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), "uint8")
    constants = jax.make_jaxpr(trained.task.serving(trained.model_variables))(images).consts
    assert sum(each.size for each in constants if each.ndim) <= finished[1]["params"] + 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --workdir=DIR, --format=NAME and --out=FILE"),
        (["--workdir=/nowhere", "--format=stablehlo", "--out=x.zip"], "/nowhere is not the workdir of a run"),
        (["--workdir=/nowhere", "--format=stablehlo", "--out=README.md"], "--out=README.md exists"),
        (["--workdir=/nowhere", "--format=stablehlo", "--out=/not/there.zip"], "create /not"),
        (["--workdir=/nowhere", "--format=saved_model", "--out=x"], "should be one of"),
    ],
)
def test_bad_input_is_answered_with_a_line(flags: list[str], message: str) -> None:
    error = run_command(EXPORT, *flags, code=2).stderr
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_file_of_another_kind_and_a_missing_package_are_refused(
    finished: Finished, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = load_trained(finished[0])
    with pytest.raises(ValueError, match=r"--out=.*model.bin must end in .safetensors"):
        export.export(trained, "safetensors", tmp_path / "model.bin")
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ValueError, match=r"needs more packages .*: pip install 'jax2onnx>=.*' onnxruntime$"):
        export.export(trained, "onnx", tmp_path / "model.onnx")


def test_a_model_that_onnx_cannot_hold_is_one_line(
    finished: Finished, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object, **how: object) -> None:
        raise NotImplementedError("no plugin for primitive 'while'\nmore")

    for name in ("jax2onnx", "onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(to_onnx=refuse))
    message = (
        r"--format=onnx: jax2onnx cannot write halvit_tiny \(no plugin for primitive 'while'\); use --format=stable"
    )
    with pytest.raises(ValueError, match=message):
        export.export(load_trained(finished[0]), "onnx", tmp_path / "model.onnx")


def test_an_export_without_the_data_is_compared_on_random_images(
    workdir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((workdir / "config.json").read_text())
    config["data"] |= {"name": "folder", "root": "moved"}
    (workdir / "config.json").write_text(json.dumps(config))
    out = tmp_path / "model.safetensors"
    flags = (f"--workdir={workdir}", "--format=safetensors", f"--out={out}", "--step=best")
    lines = run_command(EXPORT, *flags).stdout.splitlines()
    assert "largest difference of the output: 0.0e+00" in lines
    assert "the same best answer for 16 of the 16 random images" in lines
    assert lines[-1] == "not compared on the evaluation set: data.eval_split='test': data.root='moved' is not a folder"


def test_tensors_of_an_onnx_file_have_names() -> None:
    def named(*names: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in names]

    def node(given: str, made: str, inner: object = EMPTY) -> SimpleNamespace:
        return SimpleNamespace(input=[given], output=[made], attribute=[SimpleNamespace(g=inner)])

    branch = SimpleNamespace(node=[node("in_0", "x")])
    nodes = [node("in_0", "a", branch), node("a", "out_0")]
    graph = SimpleNamespace(input=named("in_0"), output=named("out_0"), node=nodes)
    model = ServingModel(lambda variables, images: images, {}, (8, 8))
    export._rename(graph, *export._tensor_names("classification", model, jax.tree.structure(0)))
    assert [each.name for each in (*graph.input, *graph.output)] == ["images", "logits"]
    assert [(each.input, each.output) for each in graph.node] == [(["images"], ["a"]), (["a"], ["logits"])]
    assert branch.node[0].input == ["images"]
    several = jax.tree.structure({"boxes": 0, "scores": 0})
    assert export._tensor_names("detection", model, several) == (["images"], ["boxes", "scores"])
