"""`python -m halvit_jax.convert`."""

import pathlib
import subprocess
from typing import Any

import jax
import numpy as np
import pytest
from helpers.processes import run_command

from halvit_jax.convert import from_torch, readers, shapes_of, to_torch, torch_shapes, weights_file
from halvit_jax.convert.__main__ import convert
from halvit_jax.models import create_model
from halvit_jax.trees import unflatten

ROOT = pathlib.Path(__file__).parents[2]
TINY = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 24, "num_classes": 5}


def run(*arguments: str | pathlib.Path, code: int = 0) -> subprocess.CompletedProcess:
    """One process."""
    return run_command("halvit_jax.convert", *map(str, arguments), code=code)


def variables_of(name: str, **fields: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = shapes_of(create_model(name, **fields)).items()
    return unflatten({path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes})


def digest(line: str) -> str:
    return line.split("sha256 ")[1]


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A file as other programs write it: official names and no metadata."""
    rng = np.random.default_rng(0)
    state = {
        name: rng.standard_normal(shape).astype(np.float32) if shape else np.zeros((), np.int64)
        for name, shape in torch_shapes("resnet18", num_classes=3).items()
    }
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    readers.write(path, state, {})
    return path


def test_the_command_converts_there_and_back(resnet18: pathlib.Path, tmp_path: pathlib.Path) -> None:
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    there = run(resnet18, ours, "--model=resnet18", "--num_classes=3").stdout.splitlines()
    again = convert(str(ours), str(back), name=None, to="torch", fields={})
    assert there[0] == again[0] == "resnet18: 11,178,051 parameters"
    assert there[1].startswith(f"{resnet18}: 122 arrays, 11,187,671 numbers, sha256 ")
    assert there[2].startswith(f"{ours}: 102 arrays, 11,187,651 numbers, sha256 ")
    assert digest(there[1]) == digest(again[2])  # the same names, types and values as at the start
    assert digest(there[2]) == digest(again[1])

    weights = readers.read(ours)
    assert weights.metadata == {"format": "halvit_jax", "model": "resnet18", "fields": '{"num_classes": 3}'}
    assert "params/stage4/block1/conv2/kernel" in weights.arrays
    assert "batch_stats/stem/norm/var" in weights.arrays
    expected = from_torch("resnet18", readers.read(resnet18).arrays, num_classes=3)
    jax.tree.map(np.testing.assert_array_equal, weights_file.load(ours).variables, expected)


def test_bad_input_is_an_error_of_one_line(resnet18: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert "error: give an input and an output file" in run(resnet18, code=2).stderr
    bad = run(resnet18, tmp_path / "x.safetensors", "--model=resnet18", code=2).stderr
    assert bad.startswith("error: these weights do not fit resnet18; 2 shape mismatch: fc.")
    assert len(bad.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_halvit_is_written_as_a_deit(tmp_path: pathlib.Path) -> None:
    source, target = tmp_path / "halvit.safetensors", tmp_path / "deit.safetensors"
    variables = variables_of("halvit_tiny", **TINY)
    weights_file.save(source, "halvit_tiny", variables, **TINY, drop_path=None)
    lines = convert(str(source), str(target), name="halvit_tiny", to="deit", fields={"num_classes": None})
    deit = readers.read(target)
    assert deit.metadata == {"format": "pt", "model": "halvit_tiny"}
    expected = to_torch("halvit_tiny", variables, as_deit=True, **TINY)
    assert deit.arrays.keys() == expected.keys()
    assert all(np.array_equal(deit.arrays[name], array) for name, array in expected.items())
    assert int(lines[1].split()[3].replace(",", "")) < int(lines[2].split()[3].replace(",", ""))


def test_the_models_of_file_and_flags_must_agree(resnet18: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source, target = tmp_path / "vit.safetensors", str(tmp_path / "x.safetensors")
    weights_file.save(source, "deit_tiny", variables_of("deit_tiny", **TINY), **TINY)
    with pytest.raises(
        ValueError, match=r"resnet18.safetensors does not name its model; give its name \(--model=NAME\)"
    ):
        convert(str(resnet18), target, name=None, to="jax", fields={})
    with pytest.raises(ValueError, match=r"vit.safetensors is of deit_tiny, not of deit_small"):
        convert(str(source), target, name="deit_small", to="torch", fields={})
    with pytest.raises(ValueError, match=r"do not fit deit_tiny; 2 shape mismatch: params/head"):
        convert(str(source), target, name="deit_tiny", to="torch", fields={"num_classes": 7})
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        convert(str(resnet18), target, name="resnet_18", to="jax", fields={})
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        convert(str(source), str(tmp_path / "x.pth"), name=None, to="torch", fields={})


def test_a_file_that_exists_is_not_overwritten(resnet18: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.safetensors").write_text("mine")
    error = run(resnet18, tmp_path / "mine.safetensors", "--model=resnet18", "--num_classes=3", code=2).stderr
    assert error == f"error: {tmp_path}/mine.safetensors exists; name another file, or remove it\n"
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


def test_another_model_is_answered_in_a_line_that_can_be_read(resnet18: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name in ("deit_tiny", "resnt18"):
        with pytest.raises(ValueError, match=name) as error:
            convert(str(resnet18), str(tmp_path / "x.safetensors"), name=name, to="jax", fields={})
        assert len(str(error.value)) < 1200
