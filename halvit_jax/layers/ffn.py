"""Feed-forward layers of a transformer block: dense and tied.

Shapes: `b` batch, `n` tokens, `d` width, `f` hidden. Every class maps [b, n, d] -> [b, n, d] and takes the same fields,
so that a block chooses one by name.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.init import Dtype, normal_02
from halvit_jax.layers.tied import TiedDense


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x * Phi(x) = x (1 + erf(x / sqrt 2)) / 2, computed in float32 at least, as PyTorch does.

    Flax's default is the tanh approximation, off by up to 5e-4; its exact form is written with erfc, which on a CPU
    takes twice as long.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


class Mlp(nn.Module):
    """W2 gelu(W1 x + b1) + b2, with two matrices."""

    width: int  # d
    hidden: int  # f
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.Dense(self.hidden, kernel_init=normal_02, dtype=self.dtype, name="expand")(x)
        return nn.Dense(self.width, kernel_init=normal_02, dtype=self.dtype, name="reduce")(gelu(h))


class TiedMlp(nn.Module):
    """W^T gelu(W x + b1) + b2, with one matrix (HaLViT)."""

    width: int  # d
    hidden: int  # f
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        tied = TiedDense(self.width, self.hidden, dtype=self.dtype, name="tied")
        b1 = self.param("hidden_bias", nn.initializers.zeros, (self.hidden,))
        b2 = self.param("bias", nn.initializers.zeros, (self.width,))
        h = tied.project(x)
        y = tied.project_back(gelu(h + b1.astype(h.dtype)))
        return y + b2.astype(y.dtype)


FFN: dict[str, type[nn.Module]] = {"dense": Mlp, "tied": TiedMlp}
