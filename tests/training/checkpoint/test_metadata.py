"""The metadata of arrays in a checkpoint, compared with a state."""

import jax
import jax.numpy as jnp

from halvit_jax.training.checkpoint.metadata import diff


def test_compare_lists_every_difference_by_path() -> None:
    saved = {
        "a/same": {"dtype": "float32", "shape": [2, 3]},
        "b/extra": {"dtype": "float32", "shape": [4]},
        "c/shape": {"dtype": "float32", "shape": [2, 3]},
        "d/dtype": {"dtype": "float32", "shape": [1]},
    }
    wanted = {
        "a/same": jax.ShapeDtypeStruct((2, 3), jnp.float32),
        "c/shape": jax.ShapeDtypeStruct((3, 2), jnp.float32),
        "d/dtype": jax.ShapeDtypeStruct((1,), jnp.bfloat16),
        "e/missing": jax.ShapeDtypeStruct((), jnp.int32),
    }
    assert diff(saved, wanted) == [
        "b/extra: float32 (4,) saved, not in this model",
        "c/shape: float32 (2, 3) saved, float32 (3, 2) in this model",
        "d/dtype: float32 (1,) saved, bfloat16 (1,) in this model",
        "e/missing: not saved, int32 () in this model",
    ]
    assert diff(saved, {"a/same": wanted["a/same"]})[0].startswith("b/extra")
    assert diff({"a/same": saved["a/same"]}, {"a/same": wanted["a/same"]}) == []
