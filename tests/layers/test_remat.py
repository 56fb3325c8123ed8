"""Rematerialised blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.blocks import block_input, small_block
from helpers.jaxprs import count_remats

from halvit_jax.layers.remat import run_block
from halvit_jax.trees import flatten


class _Net(nn.Module):
    remat: bool

    def setup(self) -> None:
        self.block = small_block(drop_path=0.5)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return run_block(self.block, x, remat=self.remat, train=train)


@pytest.mark.slow
def test_remat_changes_neither_paths_nor_outputs_nor_gradients() -> None:
    x = block_input()
    variables = _Net(False).init(jax.random.key(0), x, train=False)
    assert list(flatten(_Net(True).init(jax.random.key(0), x, train=False))) == list(flatten(variables))

    def loss(variables: dict, net: _Net) -> jax.Array:
        return jnp.sin(net.apply(variables, x, train=True, rngs={"drop_path": jax.random.key(1)})).sum()

    plain, again = (jax.value_and_grad(loss)(variables, _Net(remat)) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, again)
    nets = [_Net(remat) for remat in (False, True)]
    assert [count_remats(lambda v, net=net: loss(v, net), variables) for net in nets] == [0, 1]
