import jax
import numpy as np
from flax import linen as nn
from helpers.blocks import WIDTH, block_input, small_block

from halvit_jax.layers.attention import SelfAttention
from halvit_jax.layers.ffn import Mlp


def test_the_block_names_what_it_is_given() -> None:
    x, block = block_input(), small_block()
    variables = block.init(jax.random.key(0), x, train=False)
    assert set(variables["params"]) == {"attention", "attention_norm", "ffn", "ffn_norm"}
    p = variables["params"]
    norm = nn.LayerNorm(1e-6)
    y = x + SelfAttention(WIDTH, 2).apply({"params": p["attention"]}, norm.apply({"params": p["attention_norm"]}, x))
    z = y + Mlp(WIDTH, 2 * WIDTH).apply({"params": p["ffn"]}, norm.apply({"params": p["ffn_norm"]}, y), train=False)
    np.testing.assert_allclose(block.apply(variables, x, train=False), z, rtol=1e-5, atol=1e-6)
