import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halvit_jax.layers.attention import SelfAttention
from halvit_jax.layers.block import PreNormBlock
from halvit_jax.layers.ffn import Mlp
from halvit_jax.layers.remat import run_block
from halvit_jax.trees import flatten

D = 8


def _block(**fields: float) -> PreNormBlock:
    attention, ffn = functools.partial(SelfAttention, D, 2), functools.partial(Mlp, D, 2 * D)
    return PreNormBlock(attention, ffn, 1e-6, fields.get("drop_path", 0.0), None)


def _input() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, D)), jnp.float32)


def test_the_block_names_what_it_is_given() -> None:
    x, block = _input(), _block()
    variables = block.init(jax.random.key(0), x, train=False)
    assert set(variables["params"]) == {"attention", "attention_norm", "ffn", "ffn_norm"}
    p = variables["params"]
    norm = nn.LayerNorm(1e-6)
    y = x + SelfAttention(D, 2).apply({"params": p["attention"]}, norm.apply({"params": p["attention_norm"]}, x))
    z = y + Mlp(D, 2 * D).apply({"params": p["ffn"]}, norm.apply({"params": p["ffn_norm"]}, y), train=False)
    np.testing.assert_allclose(block.apply(variables, x, train=False), z, rtol=1e-5, atol=1e-6)


class _Net(nn.Module):
    remat: bool

    def setup(self) -> None:
        self.block = _block(drop_path=0.5)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return run_block(self.block, x, remat=self.remat, train=train)


def test_remat_changes_neither_paths_nor_outputs_nor_gradients() -> None:
    x = _input()
    variables = _Net(False).init(jax.random.key(0), x, train=False)
    assert list(flatten(_Net(True).init(jax.random.key(0), x, train=False))) == list(flatten(variables))

    def loss(variables: dict, net: _Net) -> jax.Array:
        return jnp.sin(net.apply(variables, x, train=True, rngs={"drop_path": jax.random.key(1)})).sum()

    plain, again = (jax.value_and_grad(loss)(variables, _Net(remat)) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, again)
    programs = [
        str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(variables, _Net(remat))) for remat in (False, True)
    ]
    assert ["remat" in program or "checkpoint" in program for program in programs] == [False, True]
