"""Memory traffic of one layer, forwards and backwards, plain and fused, as the TPU compiler reports it; no TPU needed.

python tests/accelerator/layer_traffic.py v5e full dense       # any of: full tied (attention), dense tied_ffn
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from halvit_jax.analysis.hlo import hbm_bytes
from halvit_jax.analysis.tpu_topology import parse_topology, tpu_devices
from halvit_jax.layers.attention import SelfAttention, TiedAttention
from halvit_jax.layers.ffn import Mlp, TiedMlp

BATCH, TOKENS, WIDTH, HEADS = 128, 197, 384, 6  # of DeiT-S and HaLViT-T, on one chip


def layer(name: str, chosen: str) -> nn.Module:
    match name:
        case "full":
            return SelfAttention(WIDTH, HEADS, attention_impl=chosen, dtype=jnp.bfloat16)
        case "tied":
            return TiedAttention(WIDTH, HEADS, attention_impl=chosen, dtype=jnp.bfloat16)
        case "dense":
            return Mlp(WIDTH, 4 * WIDTH, ffn_impl=chosen, dtype=jnp.bfloat16)
        case "tied_ffn":
            return TiedMlp(WIDTH, 4 * WIDTH, ffn_impl=chosen, dtype=jnp.bfloat16)
    raise ValueError(f"{name!r} is not one of full, tied, dense, tied_ffn")


def report(kind: str, name: str, chosen: str) -> str:
    """MB an image of traffic and of temporary memory."""
    mesh = Mesh(np.array(tpu_devices(parse_topology(f"{kind}:2x2"))[:1]), ("data",))
    placed = NamedSharding(mesh, jax.P())
    module = layer(name, chosen)
    train = {} if name in ("full", "tied") else {"train": True}
    x = jax.ShapeDtypeStruct((BATCH, TOKENS, WIDTH), jnp.bfloat16, sharding=placed)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, *x.shape[1:]), x.dtype), **train))
    params = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=placed), shapes)

    def both(params: Any, x: jax.Array, direction: jax.Array) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out, pull = jax.vjp(lambda params, x: module.apply(params, x, **train), params, x)
            return out, pull(direction)

    compiled = jax.jit(both).lower(params, x, x).compile()
    accessed, memory = compiled.cost_analysis()["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes
    numbers = [one / BATCH / 1e6 for one in (accessed, hbm_bytes(compiled.as_text()), memory)]
    return " | ".join([name, chosen, *[f"{one:.2f}" for one in numbers]])


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    for given in sys.argv[2:]:
        for implementation in ("xla", "fused"):
            print(report(sys.argv[1], given, implementation), flush=True)
