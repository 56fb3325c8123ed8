import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halvit_jax.layers.sow import sow


class _Twice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        sow(self, "pair", x, 2 * x)
        return x + 1


class _Net(nn.Module):
    def setup(self) -> None:
        self.twice = _Twice()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.twice(self.twice(x))


def test_intermediates_are_sown_side_by_side_once_for_each_run() -> None:
    x = jnp.ones((2, 3))
    _, state = _Net().apply({}, x, mutable=["intermediates"])
    first, second = state["intermediates"]["twice"]["pair"]
    np.testing.assert_array_equal(first, np.repeat([[1, 2]], 3, 1).reshape(1, 6).repeat(2, 0))
    np.testing.assert_array_equal(second, 2 * first)


def test_nothing_is_sown_unless_intermediates_are_mutable() -> None:
    x = jnp.ones((2, 3))
    assert _Net().init(jax.random.key(0), x) == {}
    jaxpr = str(jax.make_jaxpr(lambda x: _Net().apply({}, x))(x))
    assert "concatenate" not in jaxpr
