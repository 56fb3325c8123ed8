import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from halvit_jax.layers import placement
from halvit_jax.layers.placement import Place
from halvit_jax.training.sharding import BATCH, make_mesh


def test_the_place_is_that_of_the_mesh_or_of_this_process() -> None:
    assert placement.current() == Place("cpu", "cpu")
    device = jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu")
    mesh = make_mesh(data=2, fsdp=2, tensor=2).abstract_mesh.update(abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert placement.current() == Place("tpu", "TPU v6 lite", rows=4, tensor=2)
    assert placement.ROWS == BATCH


def test_what_keeps_a_kernel_from_running_on_the_rows() -> None:
    assert placement.obstacle(Place("tpu", rows=4), 8) == ""
    assert "mesh.tensor=2" in placement.obstacle(Place("tpu", rows=4, tensor=2), 8)
    assert "9 rows" in placement.obstacle(Place("tpu", rows=4), 9)


@pytest.mark.parametrize("split", [True, False])
def test_rows_are_split_and_gradients_of_whole_arrays_are_summed(split: bool) -> None:
    mesh = make_mesh(data=4, fsdp=2)
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.standard_normal((16, 3))), jnp.asarray(rng.standard_normal((3, 2)))
    seen = []

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        seen.append(x.shape)
        return jnp.tanh(x @ w)

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh if split else jax.sharding.get_abstract_mesh()):
            return placement.over_rows(product, (x,), (w,)).sum()

    placed = jax.device_put(x, NamedSharding(mesh, BATCH)) if split else x
    value, grad = jax.jit(jax.value_and_grad(loss))(w, placed)
    assert set(seen) == {(2, 3) if split else (16, 3)}
    expected = jax.value_and_grad(lambda w: jnp.tanh(x @ w).sum())(w)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-5)
