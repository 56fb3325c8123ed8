"""Tasks by their names in the config."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from helpers.runs import tiny

from halvit_jax import bench
from halvit_jax.experiment import tasks


def test_an_unknown_task_is_refused_with_the_list_of_names(digits_dir: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"task.name='segmentation' is not one of classification, distillation"):
        bench.measure({"x": tiny(digits_dir, **{"task.name": "segmentation"})}, repeats=1)


@pytest.mark.parametrize(
    ("fields", "precision"),
    [
        ({"compute_dtype": "float32"}, "HIGHEST"),
        ({"compute_dtype": "float32", "matmul_precision": "high"}, "HIGH"),
        ({"compute_dtype": "bfloat16"}, ""),
    ],
)
def test_products_in_float32_have_the_precision_of_the_field(
    fields: dict[str, str], precision: str, tmp_path: pathlib.Path
) -> None:
    task = tasks.build_task(tiny(tmp_path, **fields))
    variables = jax.eval_shape(lambda: task.model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False))
    program = str(jax.make_jaxpr(lambda v, x: task.model.apply(v, x, train=False))(variables, jnp.zeros((1, 8, 8, 3))))
    products = program.split("dot_general")[1:]
    assert products
    found = {name for product in products for name in re.findall(r"Precision\.(\w+)", product)} | {
        name for product in products for name in re.findall(r"precision=\(?(\w+)", product)
    }
    assert found - {"Precision"} == ({precision} if precision else set())
