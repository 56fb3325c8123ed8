import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halvit_jax.layers.attention import SelfAttention
from halvit_jax.layers.block import PreNormBlock
from halvit_jax.layers.ffn import Mlp

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
