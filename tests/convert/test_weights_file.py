"""Weight files that name their model."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from halvit_jax.convert import readers, shapes_of, weights_file
from halvit_jax.models import create_model
from halvit_jax.trees import unflatten

TINY = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 24, "num_classes": 5}


def variables_of(name: str, **fields: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = shapes_of(create_model(name, **fields)).items()
    return unflatten({path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes})


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("halvit_tiny", TINY | {"dtype": "bfloat16"}),
        ("resnet50", {"depths": (1, 1, 1, 1), "image_size": 32, "num_classes": 0}),
    ],
)
def test_weight_files_name_their_model(name: str, fields: dict[str, Any], tmp_path: pathlib.Path) -> None:
    variables = variables_of(name, **fields)
    path = tmp_path / "x.safetensors"
    weights_file.save(path, name, variables, **fields)
    loaded = weights_file.load(path)
    assert loaded.name == name
    assert loaded.fields == json.loads(json.dumps(fields))
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    assert shapes_of(create_model(loaded.name, **loaded.fields)) == shapes_of(create_model(name, **fields))


def test_what_is_no_weight_file_is_refused(tmp_path: pathlib.Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    readers.write(foreign, {"fc.bias": np.zeros(3, np.float32)}, {})
    path, variables = tmp_path / "x.safetensors", variables_of("deit_tiny", **TINY)
    with pytest.raises(ValueError, match=r"foreign.safetensors is not a file of halvit_jax; python"):
        weights_file.load(foreign)
    with pytest.raises(ValueError, match="these variables do not fit deit_tiny"):
        weights_file.save(path, "deit_tiny", variables, **TINY | {"depth": 3})
    with pytest.raises(ValueError, match="cannot be written as JSON: Object of type Float32DType"):
        weights_file.save(path, "deit_tiny", variables, **TINY, dtype=np.dtype("float32"))
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("deit_tiny", "", "fields of the model 'deit_tiny' are invalid: ''"),
        ("deit_tiny", "[1]", "are invalid"),
        ("deit_tiny", "[" * 100_000, "are invalid"),
        ("deit_tiny", '{"depth": 1000000000}', "are invalid"),
        ("deit_tiny", '{"depth": "12"}', "are invalid"),
        ("resnet18", '{"depths": [1, 1, 1, 1000000000]}', "are invalid"),
        ("deit_tiny", '{"width": "wide"}', "the model 'deit_tiny' with the fields .* cannot be built: "),
        ("deit_tiny", '{"parent": 1}', "deit_tiny has no such field"),
        ("", "{}", "model.name='' is unknown"),
        ("deit_tiny", "{}", "these variables do not fit deit_tiny; 1 unexpected: params/x; .* missing: "),
    ],
)
def test_a_weight_file_with_wrong_metadata_is_refused(name: str, fields: str, why: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    readers.write(
        path, {"params/x": np.zeros(1, np.float32)}, {"format": "halvit_jax", "model": name, "fields": fields}
    )
    with pytest.raises(ValueError, match=why):
        weights_file.load(path)
